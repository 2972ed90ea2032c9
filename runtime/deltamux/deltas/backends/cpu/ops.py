"""The ops that have a CPU kernel: how each is prepacked, and the parameters of all slots at a module."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltamux.deltas.activations import ACTIVATION_CODES
from deltamux.deltas.backends.cpu import slot_params
from deltamux.deltas.backends.cpu.experts import SlotFactors
from deltamux.deltas.backends.cpu.slot_params import (
    PREPACKED,
    Affine,
    NormChange,
    Prepacked,
    PrepackedFactors,
    PrepackedVectors,
    ShrinkExpand,
    SlotParams,
    pack,
    step_rows,
)
from deltamux.deltas.backends.module_batch import ColumnRange, ModuleBatch, PackedSlice
from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.bias import Bias
from deltamux.deltas.ops.bottleneck import Bottleneck
from deltamux.deltas.ops.low_rank import LowRank
from deltamux.deltas.ops.low_rank_experts import LowRankExperts
from deltamux.deltas.ops.norm_affine import NormAffine
from deltamux.deltas.ops.scale import Scale, ScaleInput
from deltamux.deltas.ops.step import StepIndex
from deltamux.deltas.sites import NormForm


class CPUForm(NamedTuple):
    """The form of an op on the CPU kernels.

    Attributes:
        params: makes the parameters of all slots at a module, of (site, columns of each slice, number of slots, dtype);
            the site is that of the first slice, and all are alike but for their columns.
        prepack: returns an op's parameters as the kernel reads them.
    """

    params: Callable[[Any, Sequence[ColumnRange], int, torch.dtype], SlotParams]
    prepack: Callable[[Any], Prepacked]


class CPUModuleBatch(ModuleBatch):
    """A batch of all slices of a module by one call of a kernel."""

    def __init__(self, slices: Sequence[PackedSlice], params: SlotParams) -> None:
        super().__init__(slices)
        self.params = params

    def apply(self, x: Tensor, y: Tensor, step: StepIndex) -> None:
        if self.mask & step.mask:
            self.params.apply(x, y, step.derived(step_rows))

    def _set(self, slot: int, ops: Mapping[int, Op]) -> None:
        self.params.set(slot, {index: prepacked(op) for index, op in ops.items()})

    def _reset(self, slot: int) -> None:
        self.params.reset(slot)


def module_batch(
    op: type[Op], slices: Sequence[PackedSlice], num_slots: int, dtype: torch.dtype
) -> CPUModuleBatch | None:
    """Returns an op's batch at a module; None for an op without a kernel."""
    if op not in CPU_OPS:
        return None
    columns = [each.columns for each in slices]
    return CPUModuleBatch(slices, CPU_OPS[op].params(slices[0].site, columns, num_slots, dtype))


def prepack(ops: Iterable[Op]) -> None:
    """Prepacks the ops of a program that have a kernel, ahead of the step that loads them into a slot."""
    alike: dict[tuple[torch.Size, float], list[LowRank]] = {}
    for op in ops:
        if type(op) is LowRank:
            alike.setdefault((op.b.shape, op.scale), []).append(op)
        elif type(op) is LowRankExperts:
            SlotFactors.of(op)
        elif type(op) in CPU_OPS:
            prepacked(op)
    for (_, scale), same in alike.items():  # one copy for all that are alike: an adapter has hundreds
        ups = pack(scale * torch.stack([op.b for op in same])).unbind()
        for op, up in zip(same, ups, strict=True):
            vars(op)[PREPACKED] = PrepackedFactors(op.a.contiguous(), up)


def prepacked(op: Op) -> Prepacked:
    """Returns an op's parameters as its kernel reads them, made once."""
    made: Prepacked | None = vars(op).get(PREPACKED)
    if made is None:
        made = vars(op)[PREPACKED] = CPU_OPS[type(op)].prepack(op)
    return made


def _low_rank(op: LowRank) -> Prepacked:
    return PrepackedFactors.of(op.a, op.scale * op.b)


def _bottleneck(op: Bottleneck) -> Prepacked:
    reads = slot_params.FROM_X if op.parallel else slot_params.FROM_SUM if op.residual else slot_params.FROM_Y
    return PrepackedFactors.of(
        op.down_weight,
        op.scale * op.up_weight,
        down_bias=_vector(op.down_bias),
        up_bias=None if op.up_bias is None else op.scale * op.up_bias.float().contiguous(),
        activation=ACTIVATION_CODES[op.activation],
        reads=reads,
    )


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


CPU_OPS: Mapping[type[Op], CPUForm] = {
    LowRank: CPUForm(lambda site, columns, *rest: ShrinkExpand(site.in_features, columns, *rest), _low_rank),
    Bottleneck: CPUForm(lambda site, columns, *rest: ShrinkExpand(site.features, columns, *rest), _bottleneck),
    Bias: CPUForm(lambda site, *rest: Affine(*rest), lambda op: PrepackedVectors(bias=_vector(op.bias))),
    Scale: CPUForm(lambda site, *rest: Affine(*rest), lambda op: PrepackedVectors(factor=_vector(op.factor))),
    # The input changes, not the output.
    ScaleInput: CPUForm(
        lambda site, columns, *rest: Affine([ColumnRange(0, site.in_features)], *rest),
        lambda op: PrepackedVectors(factor=_vector(op.factor)),
    ),
    NormAffine: CPUForm(
        lambda site, columns, *rest: NormChange(
            site.features, site.eps, columns, *rest, centred=site.form is NormForm.LAYER
        ),
        lambda op: PrepackedVectors(_vector(op.weight), _vector(op.bias)),
    ),
}
"""By the op's own class: one derived from it has another formula."""
