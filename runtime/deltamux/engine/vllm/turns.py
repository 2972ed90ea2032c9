"""Whose turn it is when more adapters have work than there are device slots. Pure: no tensors, no vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

QUANTUM = 8
"""Steps an adapter keeps its slot before others that only decode may take it: they share the cost of the swap."""


class Work(NamedTuple):
    """What one adapter has to do.

    Attributes:
        waiting_since: arrival time of its oldest request without a first token; None if all of them decode.
        running: whether a request of it is already under way.
    """

    waiting_since: float | None
    running: bool


@dataclass
class _Standing:
    """Attributes: waited: steps with work and without a row; held: steps with a row, one after the other."""

    waited: int = 0
    held: int = 0


class Turns:
    """Chooses for every step the adapters that take part in it.

    First come those that have waited a full round (`bound`), the longest first; then those with a request that still
    waits for its first token, the oldest first; then those that hold a slot for less than a quantum; then the others,
    the longest without a row first. So first tokens come soon, a swap pays for itself, and nobody waits for ever.

    Args:
        slots: adapters that one step can mix.
        quantum: see QUANTUM.
    """

    def __init__(self, slots: int, quantum: int = QUANTUM) -> None:
        self._slots = slots
        self._quantum = quantum
        self._standings: dict[int, _Standing] = {}
        self._fruitless = False

    def bound(self, adapters: int) -> int:
        """Returns how many steps an adapter with work can be without a turn, when so many adapters have work."""
        rounds = -(-adapters // self._slots)
        return (self._quantum + 1) * rounds

    def choose(self, work: Mapping[int, Work]) -> frozenset[int] | None:
        """Returns the adapters that the next step may run; None when all of them fit."""
        if len(work) <= self._slots:
            return None
        patience = self._quantum * -(-len(work) // self._slots)
        ranked = sorted(work, key=lambda adapter: self._rank(adapter, work[adapter], patience))
        return frozenset(ranked[: self._slots])

    def took(self, work: Collection[int], ran: Collection[int]) -> None:
        """Notes which of the adapters with work had a row in the step that was planned."""
        self._fruitless = bool(work) and not ran
        before, self._standings = self._standings, {}
        for adapter in work:
            last = before.get(adapter, _Standing())
            self._standings[adapter] = _Standing(0, last.held + 1) if adapter in ran else _Standing(last.waited + 1, 0)

    def _rank(self, adapter: int, work: Work, patience: int) -> tuple[float, ...]:
        standing = self._standings.get(adapter, _Standing())
        if self._fruitless:
            # Those that were chosen got no memory for their tokens: let those run that hold the memory.
            return (not work.running, -standing.waited, adapter)
        if standing.waited >= patience:
            return (0, -standing.waited, adapter)
        if work.waiting_since is not None:
            return (1, work.waiting_since, adapter)
        if 0 < standing.held < self._quantum:
            return (2, -standing.held, adapter)
        return (3, -standing.waited, standing.held, adapter)
