"""`MergePolicy`: which program carries most of the traffic, and whether merging it pays. Pure: no tensors, no clocks.

Shares and gains are exponentially weighted over steps. A program is merged when its gain has stayed above one
threshold, and unmerged when it has stayed below a lower one: between the two nothing changes.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Self

FORGOTTEN = 1e-3
"""Share of the traffic below which a program is no longer counted: a step with a thousand programs counts few."""


class Line(NamedTuple):
    """The seconds that a number of rows takes: a fixed part, and one per row."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, few: int, few_seconds: float, many: int, many_seconds: float) -> Self:
        """Returns the line through two measurements, never falling and never below zero."""
        per_row = max(0.0, (many_seconds - few_seconds) / (many - few))
        return cls(max(0.0, few_seconds - few * per_row), per_row)

    @classmethod
    def total(cls, lines: Sequence[Self]) -> Self:
        return cls(sum(line.fixed for line in lines), sum(line.per_row for line in lines))

    def at(self, rows: int) -> float:
        return self.fixed + self.per_row * rows if rows else 0.0


class Costs(NamedTuple):
    """The costs of a program at the modules that can merge it.

    Attributes:
        base: the base's own projections there.
        ops: the program's changes of their weights.
    """

    base: Line
    ops: Line

    @classmethod
    def total(cls, parts: Sequence[Self]) -> Self:
        """Returns what several modules cost together."""
        return cls(Line.total([part.base for part in parts]), Line.total([part.ops for part in parts]))

    def saved(self, own: int, others: int) -> float:
        """Returns the seconds that merging saves in a step: the program's ops, less the others' rows done once more."""
        return self.ops.at(own) - self.base.at(others)

    def worthwhile(self, own: int, others: int) -> bool:
        """Returns whether a step of this mix should run with the merged weights."""
        return own > 0 and (others == 0 or self.saved(own, others) > 0)

    def gain(self, own: int, others: int) -> float:
        """Returns the part, 0 to 1, of the modules' time that merging saves; 0 where a step is better not merged."""
        unmerged = self.base.at(own + others) + self.ops.at(own)
        return max(0.0, self.saved(own, others)) / unmerged if own and unmerged else 0.0


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of merging and unmerging.

    Attributes:
        half_life: steps after which a step counts half.
        share: of the rows that a program needs to be measured.
        merge: gain above which it is merged; unmerge: gain below which it is no longer.
        patience: successive steps with such a gain.
        rest: steps after an unmerging, or after a merging that failed, in which nothing is merged.
    """

    half_life: int = 32
    share: float = 0.5
    merge: float = 0.10
    unmerge: float = 0.04
    patience: int = 48
    rest: int = 256


class Action(Enum):
    """The work to begin after a step."""

    NOTHING = auto()
    MEASURE = auto()
    MERGE = auto()
    UNMERGE = auto()


class Decision(NamedTuple):
    action: Action
    program_id: int = 0


NOTHING = Decision(Action.NOTHING)


class MergePolicy:
    """Decides step by step; at most one program is merged, or on its way there.

    Attributes:
        merged: id of the program that is to be merged; None: none.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._limits = thresholds or Thresholds()
        self._new = 1 - 0.5 ** (1 / self._limits.half_life)
        self._shares: dict[int, float] = {}
        self._costs: dict[int, Costs | None] = {}  # None: it cannot be merged
        self._measuring: int | None = None
        self._leader = 0
        self._gain = 0.0  # of the leader, or of the one that is merged
        self._streak = 0
        self._rest = 0
        self.merged: int | None = None

    def observe(self, rows: Mapping[int, int], total: int) -> Decision:
        """Counts one step of `total` rows, with those of each program; returns the work to begin."""
        self._rest = max(0, self._rest - 1)
        self._count(rows, total)
        if self.merged is None:
            self._follow(max(self._shares, key=self._shares.__getitem__, default=0))
        costs, own = self._costs.get(self._leader), rows.get(self._leader, 0)
        gain = costs.gain(own, total - own) if costs is not None else 0.0
        self._gain += self._new * (gain - self._gain)
        return self._leading() if self.merged is None else self._holding(self.merged)

    def measured(self, program_id: int, costs: Costs) -> None:
        """Records the measured costs of a program."""
        self._costs[program_id] = costs
        self._measuring = None

    def costs(self, program_id: int) -> Costs | None:
        return self._costs.get(program_id)

    def postpone(self) -> None:
        """Drops the last decision, which cannot be carried out now; it may be repeated after a rest."""
        self.merged = self._measuring = None
        self._rest, self._streak = self._limits.rest, 0

    def refuse(self, program_id: int) -> None:
        """Excludes a program from merging for good."""
        self._costs[program_id] = None
        if self.merged == program_id:
            self.postpone()

    def keep(self, programs: Container[int]) -> None:
        """Forgets all other programs, which are gone."""
        for gone in [p for p in self._costs.keys() | self._shares.keys() if p not in programs]:
            self._costs.pop(gone, None)
            self._shares.pop(gone, None)
        if any(p is not None and p not in programs for p in (self.merged, self._measuring)):
            self.postpone()

    def _count(self, rows: Mapping[int, int], total: int) -> None:
        for program_id in self._shares.keys() | rows.keys():
            share = self._shares.get(program_id, 0.0)
            share += self._new * (rows.get(program_id, 0) / max(total, 1) - share)
            if share > FORGOTTEN:
                self._shares[program_id] = share
            else:
                self._shares.pop(program_id, None)

    def _follow(self, leader: int) -> None:
        if leader != self._leader:
            self._leader, self._gain, self._streak = leader, 0.0, 0

    def _leading(self) -> Decision:
        leader = self._leader
        self._streak = self._streak + 1 if self._pays(leader) else 0
        if self._streak < self._limits.patience or self._rest or self._measuring is not None:
            return NOTHING
        self._streak = 0
        if leader in self._costs:
            self.merged = leader
            return Decision(Action.MERGE, leader)
        self._measuring = leader
        return Decision(Action.MEASURE, leader)

    def _pays(self, leader: int) -> bool:
        if leader in self._costs:
            return self._gain > self._limits.merge
        return self._shares.get(leader, 0.0) > self._limits.share

    def _holding(self, merged: int) -> Decision:
        self._streak = self._streak + 1 if self._gain < self._limits.unmerge else 0
        if self._streak < self._limits.patience:
            return NOTHING
        self.postpone()
        return Decision(Action.UNMERGE, merged)
