"""What folding a program makes of the engine's modules: which can fold, what it would save, and the merged weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas import LinearSite, Op, Program
from deltamux.deltas.ops import Run, StepIndex
from deltamux.deltas.ops.base import ReadTensor
from deltamux.engine.vllm.dominance import Costs, Line
from deltamux.engine.vllm.onednn import SwitchedLinear
from deltamux.engine.vllm.ports import LinearPort
from deltamux.errors import FailedPreconditionError

FEW, MANY, REPEATS = 4, 32, 3
"""Rows of the two steps that are timed, and how often; the best counts."""
LOST = 0.1
"""Part of a change, by its norm, that may be lost when the merged weight is rounded to the engine's dtype."""


class Module(NamedTuple):
    """A module of the engine that can fold; its parts cover all of its output."""

    port: LinearPort
    linear: SwitchedLinear

    @property
    def sites(self) -> list[LinearSite]:
        return [part.site for part in self.port.lanes.parts if isinstance(part.site, LinearSite)]

    @property
    def num_weights(self) -> int:
        return self.linear.in_features * self.linear.out_features


class Change(NamedTuple):
    """What a program changes of one module's weight: ops in order, by name of site."""

    module: Module
    ops: Mapping[str, Sequence[Op]]


class Merged(NamedTuple):
    """A second weight, and how to tell that the base's was the right one to start from.

    Attributes:
        weight: [out, in], the engine's dtype.
        x: [FEW, in]; y: [FEW, out] float32, what the checkpoint's weight makes of it.
    """

    weight: Tensor
    x: Tensor
    y: Tensor


def foldable(ports: Iterable[LinearPort]) -> list[Module]:
    """Returns the modules that run through a handler of oneDNN and whose every column of output is a site's."""
    found = []
    for port in ports:
        linear = SwitchedLinear.of(port.module)
        if linear is not None and sum(part.columns.size for part in port.lanes.parts) == linear.out_features:
            found.append(Module(port, linear))
    return found


def changes_of(modules: Iterable[Module], program: Program) -> list[Change]:
    """Returns what a program changes of the weights of each module that can fold all of it."""
    placed: dict[str, list[Op]] = {}
    for site, op in program:
        placed.setdefault(site, []).append(op)
    found = []
    for module in modules:
        ops = {site.name: placed.get(site.name, []) for site in module.sites}
        weights = {name: [op for op in own if op.changes_weight] for name, own in ops.items()}
        if any(weights.values()) and all(map(_weights_come_first, ops.values())):
            found.append(Change(module, weights))
    return found


def merged(change: Change, read: ReadTensor, dtype: torch.dtype) -> Merged:
    """Returns the weights of a module's parts one below the other, merged in float32 and rounded once.

    Args:
        read: returns a tensor of the base's checkpoint, which the engine has loaded in `dtype`.
    Raises:
        FailedPreconditionError: the merged weight is not finite in `dtype`, or cannot tell the change from the base.
    """
    pairs = [_merged(site, change.ops[site.name], lambda asked: read(asked).to(dtype)) for site in change.module.sites]
    base, exact = (torch.cat(weights) for weights in zip(*pairs, strict=True))
    weight, name = exact.to(dtype), change.module.sites[0].name
    if not torch.isfinite(weight).all():
        raise FailedPreconditionError(f"the merged weight at {name} is not finite in {dtype}")
    lost = float((weight.float() - exact).norm() / (exact - base).norm().clamp_min(1e-30))
    if lost > LOST:
        raise FailedPreconditionError(f"{dtype} is too coarse at {name}: rounding would lose {lost:.0%} of the change")
    x = _drawn(FEW, change.module.linear.in_features, dtype)
    return Merged(weight, x, F.linear(x.float(), base))


def timed(module: Module, slot: int, num_slots: int, dtype: torch.dtype) -> Costs:
    """Returns what the base's projection takes, and a slot's changes of its weight; for the step loop's thread."""
    base, ops = [], []
    for rows in (FEW, MANY):
        x = _drawn(rows, module.linear.in_features, dtype)
        y = torch.zeros(rows, module.linear.out_features, dtype=dtype)
        nobody, own = StepIndex((), rows, num_slots), StepIndex((Run(slot, 0, rows),), rows, num_slots)
        base.append(_best(module.linear.base, x))
        ops.append(_best(module.port.lanes.apply, x, y, nobody, None, own))
    return Costs(*(Line.through(FEW, few, MANY, many) for few, many in (base, ops)))


def _weights_come_first(ops: Sequence[Op]) -> bool:
    """Tells whether no op that changes the output stands before one that changes the weight: the order is then kept."""
    kinds = [op.changes_weight for op in ops if not op.changes_input]
    return kinds == sorted(kinds, reverse=True)


def _merged(site: LinearSite, ops: Sequence[Op], read: ReadTensor) -> tuple[Tensor, Tensor]:
    """Returns a site's weight [out, in] in float32, the base's own and with the ops merged."""
    name = f"{site.name}.weight"
    base = weight = read(name).float()
    for op in ops:
        weight = op.merge(site, {name: weight}.__getitem__)[name]
    return (base.t(), weight.t()) if site.transposed else (base, weight)


def _drawn(rows: int, features: int, dtype: torch.dtype) -> Tensor:
    # A generator of its own: sampling without a seed draws from the default one.
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).to(dtype)


def _best(run: Callable[..., object], *args: object) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run(*args)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
