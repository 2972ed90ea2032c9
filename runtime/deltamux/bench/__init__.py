"""Measuring how fast a base with adapters is served: traffic, times, ratios. Timings come from interleaved rounds.

What is measured is anything that streams: an engine in this process, or a server behind gRPC.
"""

from deltamux.bench.compare import Comparison, Contender, Figure, interleave
from deltamux.bench.measure import Measurement, Subject, drive, percentile
from deltamux.bench.subjects import ClientSubject, EngineSubject
from deltamux.bench.traffic import Request, Workload

__all__ = [
    "ClientSubject",
    "Comparison",
    "Contender",
    "EngineSubject",
    "Figure",
    "Measurement",
    "Request",
    "Subject",
    "Workload",
    "drive",
    "interleave",
    "percentile",
]
