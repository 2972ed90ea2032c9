"""Measuring how fast a base with adapters is served: traffic, times, ratios. Timings come from interleaved rounds.

What is measured is anything that streams: an engine in this process, or a server over gRPC.
"""

from deltamux.bench.compare import Candidate, Comparison, Figure, interleave
from deltamux.bench.measure import Measurement, System, drive, percentile
from deltamux.bench.systems import ClientSystem, EngineSystem
from deltamux.bench.traffic import Request, Workload

__all__ = [
    "Candidate", "ClientSystem", "Comparison", "EngineSystem", "Figure", "Measurement", "Request", "System", "Workload",
    "drive", "interleave", "percentile",
]  # fmt: skip
