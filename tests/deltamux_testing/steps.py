"""Steps for tests: their requests in order, as an index."""

from __future__ import annotations

from collections.abc import Sequence

from deltamux.deltas.ops import RowRange, StepIndex


def step_of(requests: Sequence[tuple[int, int]], num_slots: int) -> StepIndex:
    """Returns the index of a step of requests, each (slot, or -1 for the base; its rows)."""
    runs, row = [], 0
    for slot, rows in requests:
        if slot >= 0:
            runs.append(RowRange(slot, row, row + rows))
        row += rows
    return StepIndex(runs, row, num_slots)
