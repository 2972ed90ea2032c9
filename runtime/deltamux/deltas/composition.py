"""Compositions: several adapters as one, a stack or a weighted sum of its components.

A composition is an adapter like any other, with a name, versions and a digest of its own; its components are fixed
when it is made. Their tensors keep their names, after ``0.``, ``1.`` and so on.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from torch import Tensor

from deltamux.deltas.checkpoint import Checkpoint
from deltamux.deltas.ops import LowRank, Op
from deltamux.deltas.program import Program
from deltamux.errors import BaseMismatchError, InvalidArgumentError

PEFT_TYPE = "DELTAMUX_COMPOSITION"
MAX_COMPONENTS = 16


class CompositionMode(StrEnum):
    """The combination of components: ``stack`` applies one after the other; ``sum`` adds their changes by weight."""

    STACK = "stack"
    SUM = "sum"


class Component(NamedTuple):
    """One adapter of a composition.

    Attributes:
        name: what it is called in messages, such as its directory or resource name.
    """

    name: str
    checkpoint: Checkpoint
    weight: float = 1.0


def compose(parts: Sequence[Component], mode: CompositionMode) -> Checkpoint:
    """Returns the files of a composition; whether they can be combined is checked when it is compiled.

    Raises:
        InvalidArgumentError: fewer than two parts, too many, a weight that is not finite, or weights in a stack.
        BaseMismatchError: the parts were trained on different bases.
    """
    if not 2 <= len(parts) <= MAX_COMPONENTS:
        raise InvalidArgumentError(f"a composition has 2 to {MAX_COMPONENTS} parts, not {len(parts)}")
    if mode is CompositionMode.STACK and any(part.weight != 1.0 for part in parts):
        raise InvalidArgumentError("a stack applies its parts as they are; weights are for a sum")
    for part in parts:
        if not math.isfinite(part.weight):
            raise InvalidArgumentError(
                f"the weight of {part.name} is {part.weight}: a finite number is needed", metadata={"field": "parts"}
            )
    fingerprints = {p.checkpoint.metadata.get("base_fingerprint", ""): p.name for p in parts}
    known = sorted(fingerprint for fingerprint in fingerprints if fingerprint)
    if len(known) > 1:
        raise BaseMismatchError(
            f"{fingerprints[known[0]]} and {fingerprints[known[1]]} were trained on different bases",
            metadata={"bases": ",".join(known)},
        )
    described = [{"name": p.name, "weight": p.weight, "config": dict(p.checkpoint.config)} for p in parts]
    tensors = {f"{i}.{name}": t for i, part in enumerate(parts) for name, t in part.checkpoint.tensors.items()}
    metadata = {"base_fingerprint": known[0]} if known else {}
    return Checkpoint({"peft_type": PEFT_TYPE, "mode": str(mode), "parts": described}, tensors, metadata)


class ComponentTensors(Mapping[str, Tensor]):
    """The tensors of one component under their own names, read through the composition's tensors."""

    def __init__(self, part: str | int, whole: Mapping[str, Tensor]) -> None:
        self._prefix = f"{part}."
        self._whole = whole

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[self._prefix + name]

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._whole

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._whole if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def add_up(programs: Sequence[Program], weights: Sequence[float], mode: CompositionMode) -> Program:
    """Returns the program of a composition.

    In a sum, the low-rank changes of one site become one of all their ranks, which costs the engine less.

    Raises:
        InvalidAdapterError: the components cannot be combined: two prefixes, or a sum of an op that is not an added
        change.
    """
    if mode is CompositionMode.STACK:
        return Program.of(placement for program in programs for placement in program)
    others: list[tuple[str, Op]] = []
    low_rank: dict[str, list[LowRank]] = {}
    for program, weight in zip(programs, weights, strict=True):
        for site, op in program:
            weighted = op.weighted(weight)
            if type(weighted) is LowRank:
                low_rank.setdefault(site, []).append(weighted)
            else:
                others.append((site, weighted))
    return Program.of([*((site, LowRank.concatenated(ops)) for site, ops in low_rank.items()), *others])
