"""DoRA: the length of each row of a projection's weight is trained apart from its direction, which LoRA changes.

Liu et al. 2024, https://arxiv.org/abs/2402.09353.

    y = m / ||W + s B A|| * (W x + s B (A x)) + b,   m [out]; each row's norm is a constant (section 4.3)

Served as the LoRA's `LowRank`, a `Scale` by m / ||.||, and, where the base has a bias b, a `Bias` that undoes the
scale of b. It is an option of LoRA (`use_dora`), as it is in PEFT.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, Bias, LinearSite, LowRank, Op, Scale


def row_norms(base: BaseModel, site: LinearSite, low_rank: LowRank | None = None) -> Tensor:
    """Returns ||W + s B A|| of each row, [out_features] float32; without the low-rank part, ||W||."""
    weight = base.tensor(f"{site.name}.weight").float()
    weight = weight.t() if site.transposed else weight
    if low_rank is not None:
        weight = weight + low_rank.scale * (low_rank.b.float() @ low_rank.a.float())
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return norms


def magnitude_ops(base: BaseModel, site: LinearSite, low_rank: LowRank, magnitude: Tensor) -> Iterator[Op]:
    """Yields the ops after the low-rank change; differentiable in `magnitude` [out_features]."""
    factor = magnitude / row_norms(base, site, low_rank).detach().to(magnitude.dtype)
    yield Scale(factor)
    if site.has_bias:
        yield Bias(base.tensor(f"{site.name}.bias").to(factor.dtype) * (1 - factor))
