"""The result of a measurement, as one row of a table."""

from dataclasses import dataclass

from deltamux.bench.measure import Measurement, percentile

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class BenchRow:
    """One workload; times are in milliseconds.

    Attributes:
        of_base: its tokens per second as a multiple of the base's in the same rounds; None of the base itself.
        floor_bytes, floor_operations: see `deltamux.bench.floor`; None where the adapters' sizes are not known.
    """

    workload: str
    prompt_tokens: int
    tokens_per_second: float
    of_base: float | None
    first_token_p50: float
    first_token_p95: float
    first_token_p99: float
    gap_p50: float
    gap_p95: float
    gap_p99: float
    floor_bytes: float | None = None
    floor_operations: float | None = None


def times(measured: Measurement) -> dict[str, float]:
    """Returns rate and percentiles by the names of a row's fields."""
    first = {f"first_token_p{p}": 1000 * percentile(measured.first_token, p) for p in PERCENTILES}
    gaps = {f"gap_p{p}": 1000 * percentile(measured.gaps, p) for p in PERCENTILES}
    rounded = {name: round(value, 2) for name, value in (first | gaps).items()}
    return {"tokens_per_second": round(measured.tokens_per_second, 1), **rounded}
