"""The rows of a step on the device, as records of a fixed shape that kernels read.

Kernels take no number that depends on the step. They take these records, whose address and shape stay, so that a CUDA
graph which was captured once serves every later step: its programs read the records and exit where there is no work.
"""

from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltamux.deltas.ops.step import RowRange, StepIndex, VirtualToken

# Fields of a record. Record i describes row i of the step, the i-th row by slot, and the i-th tile: one array of
# records, and not one array per field, so that a step of n rows is one copy of n records.
SLOT = 0  # the row's slot; -1 for rows of the base
POSITION = 1  # which of its adapter's virtual tokens the row is; -1 for other rows
ROW = 2  # the i-th of the adapters' rows, sorted by slot
TILE_SLOT = 3  # the slot of the i-th tile: consecutive rows, in the order above, of one slot; -1 for no tile
TILE_START = 4  # its first row, in that order
TILE_COUNT = 5  # its number of rows
FIELDS = 6

DECODE_TILE = 16
"""Rows of a tile in steps like those of decoding; the least that a tensor core multiplies."""
PREFILL_TILE = 64
"""Rows of a tile in large steps, where each tile reads the slot's parameters again."""


class _Staging(NamedTuple):
    """Host memory that a copy reads from, pinned where there is a GPU, and the event at the copy's end."""

    memory: Tensor  # [max_rows, FIELDS] int32
    records: np.ndarray  # the same memory
    copied: torch.cuda.Event | None


class StepRecords:
    """The records of one step after the other, at one address.

    There are two staging areas, so that filling one never waits for the copy of the step before.

    Args:
        max_rows: rows of a step at most.
        num_slots: device slots of the engine.
        prefill_from: steps of at least so many rows are cut into tall tiles. No CUDA graph may be captured for so many
            rows: a graph's tiles are short, whatever the step that it replays.
    """

    def __init__(self, max_rows: int, num_slots: int, device: torch.device | str, *, prefill_from: int = 513) -> None:
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.records = torch.full((max_rows, FIELDS), -1, dtype=torch.int32, device=self.device)
        self.tile_rows = DECODE_TILE
        self.prefill_from = prefill_from
        self._extent = 0
        self._staging: Iterator[_Staging] = cycle([self._new_staging() for _ in range(2)])

    def fill(self, row_ranges: Iterable[RowRange], num_rows: int, virtual: Iterable[VirtualToken] = ()) -> None:
        """Sets the records of a step; every row and tile beyond it is the base's.

        The copy is asynchronous on the current stream, after the kernels of the step before.
        """
        staging = next(self._staging)
        if staging.copied is not None:
            staging.copied.synchronize()  # of the step before the last: it is over
        self.tile_rows = PREFILL_TILE if num_rows >= self.prefill_from else DECODE_TILE
        extent = max(num_rows, self._extent)  # records beyond are the base's already
        records = staging.records[:extent]
        records.fill(-1)
        for slot, start, stop in row_ranges:
            records[start:stop, SLOT] = slot
        for row, _, position in virtual:
            records[row, POSITION] = position
        self._tile(records)
        self.records[:extent].copy_(staging.memory[:extent], non_blocking=True)
        if staging.copied is not None:
            staging.copied.record()
        self._extent = num_rows

    def max_tiles(self, num_rows: int) -> int:
        """Returns how many tiles a step of so many rows has at most, whatever their slots."""
        return min(num_rows, (num_rows + self.num_slots * (self.tile_rows - 1)) // self.tile_rows)

    def _tile(self, records: np.ndarray) -> None:
        """Sorts the adapters' rows by slot and cuts each slot's into tiles."""
        slots = records[:, SLOT]
        owned = np.flatnonzero(slots >= 0)
        if not owned.size:
            return
        records[: owned.size, ROW] = owned[np.argsort(slots[owned], kind="stable")]
        counts = np.bincount(slots[owned], minlength=self.num_slots)
        tiles = -(-counts // self.tile_rows)
        slot = np.repeat(np.arange(counts.size), tiles)
        within = (np.arange(slot.size) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * self.tile_rows
        records[: slot.size, TILE_SLOT] = slot
        records[: slot.size, TILE_START] = (np.cumsum(counts) - counts)[slot] + within
        records[: slot.size, TILE_COUNT] = np.minimum(self.tile_rows, counts[slot] - within)

    def _new_staging(self) -> _Staging:
        on_gpu = self.device.type == "cuda"
        memory = torch.full(self.records.shape, -1, dtype=torch.int32, pin_memory=on_gpu)
        return _Staging(memory, memory.numpy(), torch.cuda.Event() if on_gpu else None)  # type: ignore[no-untyped-call]  # torch's


def records_of(step: StepIndex) -> StepRecords:
    """Returns the records of a step, made once per step by ``step.derived(records_of)``."""
    records = StepRecords(step.num_rows, step.num_slots, step.device)
    records.fill(step.row_ranges, step.num_rows, step.virtual.tokens if step.virtual is not None else ())
    return records
