"""Random ops of every kind at small sites, and steps of random requests."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

from deltamux.deltas import (
    Bias,
    BlockRole,
    BlockSite,
    Bottleneck,
    Dense,
    DenseHead,
    GatedBottleneck,
    GatedLowRank,
    HeadSite,
    LinearSite,
    LowRank,
    NormAffine,
    NormSite,
    Op,
    Scale,
    SignDense,
    Site,
)
from deltamux.deltas.ops.sign_dense import pack_signs
from deltamux.deltas.sites import NormForm
from deltamux_testing.steps import step_of

SLOTS = 6
FEATURES = 8
LINEAR = LinearSite("layer.linear", FEATURES, FEATURES, True, False, 0, BlockRole.ATTENTION)
NORMS = {form: NormSite("layer.norm", FEATURES, form, 1e-5, True, 0) for form in NormForm}
HEAD = HeadSite("head", FEATURES, FEATURES, None)
BLOCK = BlockSite("layers.0.attention", FEATURES, BlockRole.ATTENTION, "q", "o", 0, "norm")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int) -> tuple[Site, Op]:
    rank = 1 + seed % 5
    return LINEAR, LowRank(draw(seed, rank, FEATURES), draw(seed + 1, FEATURES, rank), scale=0.5 + seed % 3)


def bias(seed: int) -> tuple[Site, Op]:
    return LINEAR, Bias(draw(seed, FEATURES))


def norm(form: NormForm) -> Any:
    return lambda seed: (NORMS[form], NormAffine(draw(seed, FEATURES), draw(seed + 1, FEATURES) if seed % 2 else None))


def bottleneck(seed: int, *, residual: bool = False) -> tuple[Site, Op]:
    width = 1 + seed % 4
    return BLOCK, Bottleneck(
        draw(seed, width, FEATURES),
        draw(seed + 1, FEATURES, width),
        draw(seed + 2, width) if seed % 2 else None,
        draw(seed + 3, FEATURES) if seed % 3 else None,
        activation=("relu", "gelu", "tanh")[seed % 3],
        scale=0.5 + seed % 2,
        parallel=bool(seed % 2),
        residual=residual,
    )


def gate(seed: int) -> dict[str, Any]:
    return {"gate_weight": draw(seed + 7, FEATURES), "gate_bias": draw(seed + 8, 1)}


MAKERS = {
    "low_rank": factors,
    "bias": bias,
    "norm_affine, layer": norm(NormForm.LAYER),
    "norm_affine, rms": norm(NormForm.RMS),
    "bottleneck": bottleneck,
    "bottleneck, residual": partial(bottleneck, residual=True),
    "dense": lambda seed: (LINEAR, Dense(draw(seed, FEATURES, FEATURES))),
    "sign_dense": lambda seed: (LINEAR, SignDense(pack_signs(draw(seed, FEATURES, FEATURES)), 0.5 + seed % 2)),
    "dense_head": lambda seed: (HEAD, DenseHead(draw(seed, FEATURES, FEATURES))),
    "gated_low_rank": lambda seed: (LINEAR, GatedLowRank(**{**vars(factors(seed)[1]), **gate(seed)})),
    "gated_bottleneck": lambda seed: (BLOCK, GatedBottleneck(**{**vars(bottleneck(seed)[1]), **gate(seed)})),
    "scale": lambda seed: (LINEAR, Scale(draw(seed, FEATURES))),
}
steps = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 20)), min_size=1, max_size=12)
"""A step's requests: (slot, or -1 for the base; rows)."""

index_of = partial(step_of, num_slots=SLOTS)


def poisoned(op: Op, value: float) -> Op:
    """The op with every parameter full of one value; where a parameter is bits, its scale has the value."""
    tensors = {name: t if name in op.packed else torch.full_like(t, value) for name, t in op.tensors().items()}
    return op.of(tensors, {**op.attributes(), "scale": value} if op.packed else op.attributes())
