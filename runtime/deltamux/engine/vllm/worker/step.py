"""`StepIndexer`: from the requests of a step to its rows by slot."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltamux.deltas.ops.step import RowRange, StepIndex, VirtualRows, VirtualToken
from deltamux.engine.vllm.worker.slots import SlotTable


class ScheduledRequest(NamedTuple):
    """One request's share of a step.

    Attributes:
        program_id: 0 for the base.
        start: position of its first token in this step.
        num_tokens: how many of its tokens are in this step.
    """

    program_id: int
    start: int
    num_tokens: int


class StepIndexer:
    """Builds the index of each step; while the same requests decode, it returns that of the step before."""

    def __init__(self, table: SlotTable, device: torch.device) -> None:
        self._table = table
        self._device = device
        self._last: tuple[list[int], int, StepIndex] | None = None

    def forget(self) -> None:
        """Makes the next step's index a new one."""
        self._last = None

    def index(self, requests: Sequence[ScheduledRequest]) -> tuple[StepIndex, bool]:
        """Returns a step's index, and whether it is a new one."""
        program_ids = [request.program_id for request in requests]
        prefix = max(program.num_virtual_tokens for program in self._table)
        decoding = all(r.num_tokens == 1 and r.start >= prefix for r in requests)
        if decoding and self._last is not None and self._last[:2] == (program_ids, self._table.version):
            return self._last[2], False
        index = self._build(requests)
        self._last = (program_ids, self._table.version, index) if decoding else None
        return index, True

    def moved(self, tensor: Tensor) -> Tensor:
        """Returns a small tensor on the device: a step queues its copies to a GPU and never waits for them."""
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)

    def _build(self, requests: Sequence[ScheduledRequest]) -> StepIndex:
        row_ranges: list[RowRange] = []
        last: list[RowRange] = []
        virtual: list[VirtualToken] = []
        row = 0
        for request, (program_id, start, num_tokens) in enumerate(requests):
            slot = self._table.slots.get(program_id)
            if slot is not None:
                row_ranges.append(RowRange(slot, row, row + num_tokens))
                last.append(RowRange(slot, request, request + 1))
                prefix = self._table[slot].num_virtual_tokens
                virtual += [
                    VirtualToken(row + p - start, slot, p) for p in range(start, min(prefix, start + num_tokens))
                ]
            row += num_tokens
        num_slots, device = self._table.num_slots, self._device
        last_rows = StepIndex(last, len(requests), num_slots, device=device)
        virtual_rows = VirtualRows.of(virtual, self.moved) if virtual else None
        return StepIndex(row_ranges, row, num_slots, device=device, virtual=virtual_rows, last_rows=last_rows)


def rows_of(requests: Sequence[ScheduledRequest]) -> dict[int, int]:
    """Returns how many rows of a step each program has, by its id; 0 is the base's."""
    rows: dict[int, int] = {}
    for program_id, _, num_tokens in requests:
        rows[program_id] = rows.get(program_id, 0) + num_tokens
    return rows
