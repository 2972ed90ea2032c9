"""LoHa: the element-wise product of two low-rank changes, of rank up to r squared.

Hyeon-Woo et al. 2021 (FedPara), https://arxiv.org/abs/2108.06098; as LyCORIS and PEFT have it.

    W' = W + s (A1 B1) * (A2 B2),   A [out, r], B [r, in],   s = alpha / r

Served exactly as `LowRank` of rank r^2: row by row, (A1 B1) * (A2 B2) = (A1 x A2)(B1 x B2) with the face-splitting
product x; or as `Dense`, where that is smaller. Files are PEFT's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, LinearSite, Program
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import invalid
from deltamux_plugins.peft_format import AS_PEFT, PREFIX, low_rank_or_dense, refuse_to_train, shaped
from deltamux_plugins.targets import Targeted, by_pattern, peft_values, targets

PARTS = ("w1_a", "w1_b", "w2_a", "w2_b")


@dataclass(frozen=True)
class LoHaConfig(Targeted):
    """PEFT's LoHaConfig.

    Attributes:
        r: rank of each of the two factors.
        alpha: numerator of the scale.
        rank_pattern, alpha_pattern: by pattern over paths; the first that matches the path's end counts.
        rank_dropout, module_dropout: of PEFT's training; not applied here.
        init_weights: whether a fresh adapter is the identity (B2 zero).
    """

    r: int = 8
    alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(r < 1 for r in (self.r, *self.rank_pattern.values())):
            raise invalid("r", "and rank_pattern hold positive integers")

    def rank(self, site: LinearSite) -> int:
        return by_pattern(self.rank_pattern, site.name) or self.r

    def scale(self, site: LinearSite) -> float:
        alpha = by_pattern(self.alpha_pattern, site.name)
        return float(self.alpha if alpha is None else alpha) / self.rank(site)


# Train.


@hookimpl
def deltamux_parameters(config: LoHaConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    refuse_to_train(config, "rank_dropout", "module_dropout", "modules_to_save")
    inits = (*[kaiming_uniform] * 3, torch.nn.init.zeros_ if config.init_weights else kaiming_uniform)
    return {
        name: ParameterSpec(shape, init)
        for site in targets(config, base)
        for (name, shape), init in zip(_tensors(config, site), inits, strict=True)
    }


def kaiming_uniform(tensor: Tensor) -> None:
    """Fills a tensor as torch's Linear starts."""
    torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


@hookimpl
def deltamux_config(config: LoHaConfig, base: BaseModel) -> dict[str, Any]:
    return peft_values(config, base)


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: LoHaConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    def change(site: LinearSite) -> Any:
        a1, b1, a2, b2 = (shaped(tensors, name, shape, base) for name, shape in _tensors(config, site))
        up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
        down = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
        return low_rank_or_dense(down, up, config.scale(site))

    return Program.of((site.name, change(site)) for site in targets(config, base))


def _tensors(config: LoHaConfig, site: LinearSite) -> list[tuple[str, tuple[int, int]]]:
    """Returns (name, shape) of A1, B1, A2 and B2."""
    rank = config.rank(site)
    shapes = [(site.out_features, rank), (rank, site.in_features)] * 2
    return [(f"{PREFIX}{site.name}.hada_{part}", shape) for part, shape in zip(PARTS, shapes, strict=True)]


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="loha",
        title="LoHa",
        summary="the element-wise product of two low-rank changes at chosen projections",
        paper="https://arxiv.org/abs/2108.06098",
        peft_type="LOHA",
        config_class=LoHaConfig,
        ignored_keys=frozenset({"use_effective_conv2d"}),
        file_defaults=AS_PEFT,
        merges=True,
        in_peft=True,
        learning_rate=1e-3,
        learning_rate_source="a few times LoRA's: one factor starts at zero and the product damps the others",
        learning_rate_width=4096,
    )
