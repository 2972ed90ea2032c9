"""Steps for tests: their requests in order, as an index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deltamux.deltas.ops import RowRange, StepIndex


def rows_of(step: Sequence[tuple[int, int]]) -> Iterator[tuple[int, slice]]:
    """Yields the slot and the rows of each request of a step."""
    row = 0
    for slot, count in step:
        yield slot, slice(row, row + count)
        row += count


def step_of(requests: Sequence[tuple[int, int]], num_slots: int) -> StepIndex:
    """Returns the index of a step of requests, each (slot, or -1 for the base; its rows)."""
    ranges = [(slot, rows) for slot, rows in rows_of(requests)]
    runs = [RowRange(slot, rows.start, rows.stop) for slot, rows in ranges if slot >= 0]
    return StepIndex(runs, ranges[-1][1].stop if ranges else 0, num_slots)
