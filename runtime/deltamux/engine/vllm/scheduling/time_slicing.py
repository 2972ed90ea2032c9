"""`AdapterTimeSlicer`: which adapters run in a step when more have work than there are slots (no tensors, no vLLM)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

QUANTUM = 8
"""Steps for which an adapter keeps its slot before others that only decode may take it, so that a swap pays."""


class Work(NamedTuple):
    """The work of one adapter for the next step.

    Attributes:
        waiting_since: arrival time of its oldest request without a first token; None if all of them decode.
        running: whether a request of it is already under way.
    """

    waiting_since: float | None
    running: bool


@dataclass
class _History:
    """The successive steps of an adapter with work that had no row (`waited`), or had one (`held`)."""

    waited: int = 0
    held: int = 0


class AdapterTimeSlicer:
    """Chooses for every step the adapters that take part in it.

    The order is: adapters that have waited for `max_wait`, the longest first; those with a request without a first
    token, the oldest first; those that have had a slot for less than a quantum; the others, the longest without a row
    first.

    Args:
        slots: adapters that one step can mix.
        quantum: see QUANTUM.
    """

    def __init__(self, slots: int, quantum: int = QUANTUM) -> None:
        self._slots = slots
        self._quantum = quantum
        self._histories: dict[int, _History] = {}
        self._fruitless = False

    def max_wait(self, adapters: int) -> int:
        """Returns the most steps that an adapter with work is left out of, when so many adapters have work."""
        return (self._quantum + 1) * -(-adapters // self._slots)

    def choose(self, work: Mapping[int, Work]) -> frozenset[int] | None:
        """Returns the program ids of the adapters that the next step may run; None when all of them fit."""
        if len(work) <= self._slots:
            return None
        patience = self._quantum * -(-len(work) // self._slots)
        ranked = sorted(work, key=lambda program_id: self._rank(program_id, work[program_id], patience))
        return frozenset(ranked[: self._slots])

    def record(self, work: Collection[int], ran: Collection[int]) -> None:
        """Records which of the adapters with work had a row in the step that was planned."""
        self._fruitless = bool(work) and not ran
        before, self._histories = self._histories, {}
        for program_id in work:
            last = before.get(program_id, _History())
            self._histories[program_id] = (
                _History(0, last.held + 1) if program_id in ran else _History(last.waited + 1, 0)
            )

    def _rank(self, program_id: int, work: Work, patience: int) -> tuple[float, ...]:
        history = self._histories.get(program_id, _History())
        if self._fruitless:
            # The chosen ones got no memory for their tokens: those that hold the memory run.
            return (not work.running, -history.waited, program_id)
        if history.waited >= patience:
            return (0, -history.waited, program_id)
        if work.waiting_since is not None:
            return (1, work.waiting_since, program_id)
        if 0 < history.held < self._quantum:
            return (2, -history.held, program_id)
        return (3, -history.waited, history.held, program_id)
