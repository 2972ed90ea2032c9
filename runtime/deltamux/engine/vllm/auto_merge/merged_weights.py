"""The modules that can merge a program, what that would save, and the merged weights."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas import LinearSite, Op, Program
from deltamux.deltas.ops import RowRange, StepIndex
from deltamux.deltas.ops.base import ReadTensor
from deltamux.engine.vllm.auto_merge.policy import Costs, Line
from deltamux.engine.vllm.auto_merge.switched_linear import SwitchedLinear
from deltamux.engine.vllm.layers.linear import LinearWithDeltas
from deltamux.errors import FailedPreconditionError

FEW, MANY, REPEATS = 4, 32, 3
"""Rows of the two steps that are timed, and how often; the best counts."""
LOST = 0.1
"""Share of a change, by its norm, that may be lost when the merged weight is rounded to the engine's dtype."""


class MergeableModule(NamedTuple):
    """A module of the engine that can merge; its slices cover all of its output."""

    layer: LinearWithDeltas
    linear: SwitchedLinear

    @property
    def sites(self) -> list[LinearSite]:
        return [each.site for each in self.layer.ops.slices if isinstance(each.site, LinearSite)]

    @property
    def num_weights(self) -> int:
        return self.linear.in_features * self.linear.out_features


class WeightChange(NamedTuple):
    """A program's change of one module's weight: ops in order, by name of site."""

    module: MergeableModule
    ops: Mapping[str, Sequence[Op]]


class MergedWeight(NamedTuple):
    """A second weight, and a check that the checkpoint's weight is the one that the engine has loaded.

    Attributes:
        weight: [out, in], the engine's dtype.
        x: [FEW, in]; y: [FEW, out] float32, what the checkpoint's weight makes of it.
    """

    weight: Tensor
    x: Tensor
    y: Tensor


def mergeable_modules(linears: Iterable[LinearWithDeltas]) -> list[MergeableModule]:
    """Returns the modules that run through a handler of oneDNN and whose every column of output is a site's."""
    found = []
    for layer in linears:
        linear = SwitchedLinear.of(layer.module, sum(each.columns.size for each in layer.ops.slices))
        if linear is not None:
            found.append(MergeableModule(layer, linear))
    return found


def changes_of(modules: Iterable[MergeableModule], program: Program) -> list[WeightChange]:
    """Returns what a program changes of the weights of each module that can merge all of it."""
    placed: dict[str, list[Op]] = {}
    for site, op in program:
        placed.setdefault(site, []).append(op)
    found = []
    for module in modules:
        ops = {site.name: placed.get(site.name, []) for site in module.sites}
        weights = {name: [op for op in own if op.changes_weight] for name, own in ops.items()}
        if any(weights.values()) and all(map(_weights_come_first, ops.values())):
            found.append(WeightChange(module, weights))
    return found


def merge_change(change: WeightChange, read: ReadTensor, dtype: torch.dtype) -> MergedWeight:
    """Returns the weights of a module's slices one below the other, merged in float32 and rounded once.

    Args:
        read: returns a tensor of the base's checkpoint, which the engine has loaded in `dtype`.
    Raises:
        FailedPreconditionError: the merged weight is not finite in `dtype`, or rounds the change away.
    """
    pairs = [
        _merge_site(site, change.ops[site.name], lambda name: read(name).to(dtype)) for site in change.module.sites
    ]
    base, exact = (torch.cat(weights) for weights in zip(*pairs, strict=True))
    weight, name = exact.to(dtype), change.module.sites[0].name
    if not torch.isfinite(weight).all():
        raise FailedPreconditionError(f"the merged weight at {name} is not finite in {dtype}")
    lost = float((weight.float() - exact).norm() / (exact - base).norm().clamp_min(1e-30))
    if lost > LOST:
        raise FailedPreconditionError(f"{dtype} is too coarse at {name}: rounding would lose {lost:.0%} of the change")
    x = _drawn(FEW, change.module.linear.in_features, dtype)
    return MergedWeight(weight, x, F.linear(x.float(), base))


def time_module(module: MergeableModule, slot: int, num_slots: int, dtype: torch.dtype) -> Costs:
    """Returns what the base's projection takes, and a slot's changes of its weight; for the step loop's thread."""
    base, ops = [], []
    for rows in (FEW, MANY):
        x = _drawn(rows, module.linear.in_features, dtype)
        y = torch.zeros(rows, module.linear.out_features, dtype=dtype)
        base_alone, own = StepIndex((), rows, num_slots), StepIndex((RowRange(slot, 0, rows),), rows, num_slots)
        base.append(_best(module.linear.base, x))
        ops.append(_best(module.layer.ops.apply, x, y, base_alone, None, own))
    return Costs(*(Line.through(FEW, few, MANY, many) for few, many in (base, ops)))


def _weights_come_first(ops: Sequence[Op]) -> bool:
    """Returns whether ops that change the weight all come before those that change the output."""
    kinds = [op.changes_weight for op in ops if not op.changes_input]
    return kinds == sorted(kinds, reverse=True)


def _merge_site(site: LinearSite, ops: Sequence[Op], read: ReadTensor) -> tuple[Tensor, Tensor]:
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
