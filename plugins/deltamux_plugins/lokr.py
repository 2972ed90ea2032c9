"""LoKr: a change that is a Kronecker product of two small matrices, the larger of them low-rank.

Yeh et al. 2023 (LyCORIS), https://arxiv.org/abs/2309.14859; Edalati et al. 2022 (KronA),
https://arxiv.org/abs/2212.10650.

    W' = W + s kron(W1, W2),   W1 [l, m], W2 [k, n],  l k = out, m n = in,   s = alpha / r
    W2 = W2a W2b of rank r where that is smaller; W1 likewise with `decompose_both`

Served as `LowRank` where the factors make it smaller (kron(P1 Q1, P2 Q2) = kron(P1, P2) kron(Q1, Q2)), else as `Dense`.
Files are PEFT's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, Dense, LinearSite, LowRank, Program
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import invalid
from deltamux_plugins.loha import LoHaConfig, kaiming_uniform
from deltamux_plugins.peft_format import AS_PEFT, PREFIX, refuse_to_train, shaped
from deltamux_plugins.targets import peft_values, targets


@dataclass(frozen=True)
class LoKrConfig(LoHaConfig):
    """PEFT's LoKrConfig; what it shares with LoHa's is described there.

    Attributes:
        decompose_both: whether W1 is low-rank, too.
        decompose_factor: largest size of W1's dimensions; -1 splits sizes near their square roots.
        init_weights: True or "lycoris": which factor begins at zero, so that a fresh adapter is the identity.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True  # type: ignore[assignment]  # PEFT's LoKr has one value more than its LoHa

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.init_weights, str) and self.init_weights != "lycoris":
            raise invalid("init_weights", f"is true, false or lycoris, not {self.init_weights!r}")
        if self.decompose_factor == 0 or self.decompose_factor < -1:
            raise invalid("decompose_factor", f"is positive or -1, not {self.decompose_factor}")


# Train.


@hookimpl
def deltamux_parameters(config: LoKrConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    refuse_to_train(config, "rank_dropout", "module_dropout", "modules_to_save")
    zero = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), False: ()}[config.init_weights]
    return {
        _name(site, part): ParameterSpec(shape, torch.nn.init.zeros_ if part in zero else kaiming_uniform)
        for site in targets(config, base)
        for part, shape in _shapes(config, site).items()
    }


@hookimpl
def deltamux_config(config: LoKrConfig, base: BaseModel) -> dict[str, Any]:
    return peft_values(config, base)


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: LoKrConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    def change(site: LinearSite) -> LowRank | Dense:
        parts = {part: shaped(tensors, _name(site, part), shape, base) for part, shape in _shapes(config, site).items()}
        p1, q1 = _factors(parts, "w1")
        p2, q2 = _factors(parts, "w2")
        rank = q1.shape[0] * q2.shape[0]
        if rank * (site.in_features + site.out_features) < site.in_features * site.out_features:
            return LowRank(torch.kron(q1, q2), torch.kron(p1, p2), config.scale(site))
        return Dense(config.scale(site) * torch.kron(p1 @ q1, p2 @ q2))

    return Program.of((site.name, change(site)) for site in targets(config, base))


def _factors(parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Returns P and Q with P Q the matrix; one of them is the identity where the matrix is whole."""
    if name not in parts:
        return parts[f"{name}_a"], parts[f"{name}_b"]
    whole = parts[name]
    eye = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return (whole, eye) if whole.shape[1] <= whole.shape[0] else (eye, whole)


def _shapes(config: LoKrConfig, site: LinearSite) -> dict[str, tuple[int, int]]:
    """Returns the shapes of what the file holds for a projection."""
    (out_1, out_2), (in_1, in_2) = (
        factorise(size, config.decompose_factor) for size in (site.out_features, site.in_features)
    )
    rank, shapes = config.rank(site), dict[str, tuple[int, int]]()
    if config.decompose_both and rank < max(out_1, in_1) / 2:
        shapes |= {"w1_a": (out_1, rank), "w1_b": (rank, in_1)}
    else:
        shapes["w1"] = (out_1, in_1)
    if rank < max(out_2, in_2) / 2:
        shapes |= {"w2_a": (out_2, rank), "w2_b": (rank, in_2)}
    else:
        shapes["w2"] = (out_2, in_2)
    return shapes


def factorise(size: int, factor: int = -1) -> tuple[int, int]:
    """Splits a size in two, the smaller first and not above `factor`; -1 takes the pair nearest to the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= limit)
    return small, size // small


def _name(site: LinearSite, part: str) -> str:
    return f"{PREFIX}{site.name}.lokr_{part}"


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="lokr",
        title="LoKr",
        summary="Kronecker products of small matrices at chosen projections",
        paper="https://arxiv.org/abs/2309.14859",
        peft_type="LOKR",
        config_class=LoKrConfig,
        ignored_keys=frozenset({"use_effective_conv2d"}),
        file_defaults=AS_PEFT,
        merges=True,
        in_peft=True,
        learning_rate=1e-3,
        learning_rate_source="a few times LoRA's, as LoHa's",
        learning_rate_width=4096,
    )
