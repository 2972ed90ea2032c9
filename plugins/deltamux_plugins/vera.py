"""VeRA: one pair of frozen random matrices for all projections, and two trained vectors for each.

Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454.

    y = W x + diag(b) B (diag(d) A x),   A [r, in], B [out, r] random and shared, b [out], d [r] trained

Served as `LowRank` with the vectors multiplied in (or as `Dense`, where that is smaller). Files are PEFT's; the random
matrices are in the file, or made anew from their seed as PEFT makes them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, LinearSite, Program
from deltamux.errors import BaseMismatchError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import check_no_bias, invalid
from deltamux_plugins.peft_defaults import VERA_TARGETS, Names
from deltamux_plugins.peft_format import AS_PEFT, PREFIX, low_rank_or_dense, refuse_to_train, shaped
from deltamux_plugins.targets import Targeted, fan_in_fan_out, peft_values, targets

SHARED_A, SHARED_B = "base_model.vera_A", "base_model.vera_B"


@dataclass(frozen=True)
class VeRAConfig(Targeted):
    """PEFT's VeraConfig.

    Attributes:
        r: rank of the shared matrices.
        projection_prng_key: seed of the shared matrices.
        save_projection: whether the file holds the shared matrices, too.
        vera_dropout: while training.
        d_initial: initial value of d; that of b is zero.
        bias: none; adapters whose biases were trained are not served.
        init_weights: whether the vectors have these initial values; False is for tests of PEFT.
    """

    peft_targets: ClassVar[Mapping[str, Names]] = VERA_TARGETS

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1 or not 0 <= self.vera_dropout < 1:
            raise invalid("r", "is positive, and vera_dropout a probability below 1")
        check_no_bias(self.bias)


# Train.


@hookimpl
def deltamux_parameters(config: VeRAConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    refuse_to_train(config, "modules_to_save")
    parameters: dict[str, ParameterSpec] = {}
    for site in targets(config, base):
        b, d = _names(site)
        parameters[b] = ParameterSpec((site.out_features,), torch.nn.init.zeros_)
        parameters[d] = ParameterSpec((config.r,), lambda tensor: torch.nn.init.constant_(tensor, config.d_initial))
    return parameters


@hookimpl
def deltamux_export(config: VeRAConfig, base: BaseModel, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {**parameters, **_projections(config, base)} if config.save_projection else parameters


@hookimpl
def deltamux_config(config: VeRAConfig, base: BaseModel) -> dict[str, Any]:
    values = peft_values(config, base)
    if config.exclude_modules is None:
        del values["exclude_modules"]  # PEFT's VeRA has no such key
    return {**values, **fan_in_fan_out(config, base)}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: VeRAConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    sites = targets(config, base)
    shared = tensors if SHARED_A in tensors else _projections(config, base)
    a, b = shared[SHARED_A], shared[SHARED_B]
    needed = _sizes(sites)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != config.r or (b.shape[0], a.shape[1]) < needed:
        raise BaseMismatchError(
            f"{SHARED_A} {list(a.shape)} and {SHARED_B} {list(b.shape)} do not span rank {config.r} and the sizes "
            f"{list(needed)} of this base",
            metadata={"tensor": SHARED_A},
        )

    def change(site: LinearSite) -> Any:
        scale_b, scale_d = _names(site)
        own_b = shaped(tensors, scale_b, (site.out_features,), base)
        own_d = shaped(tensors, scale_d, (config.r,), base)
        down = own_d.unsqueeze(1) * a[:, : site.in_features].to(own_d)
        up = own_b.unsqueeze(1) * b[: site.out_features].to(own_b)
        return low_rank_or_dense(down, up, dropout=config.vera_dropout)

    return Program.of((site.name, change(site)) for site in sites)


def _projections(config: VeRAConfig, base: BaseModel) -> dict[str, Tensor]:
    """Returns the shared matrices of a seed: uniform as by Kaiming, one after the other from one generator."""
    out_features, in_features = _sizes(targets(config, base))
    generator = torch.Generator().manual_seed(config.projection_prng_key)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return {SHARED_A: draw(config.r, in_features), SHARED_B: draw(out_features, config.r)}


def _sizes(sites: list[LinearSite]) -> tuple[int, int]:
    return max(site.out_features for site in sites), max(site.in_features for site in sites)


def _names(site: LinearSite) -> tuple[str, str]:
    return f"{PREFIX}{site.name}.vera_lambda_b", f"{PREFIX}{site.name}.vera_lambda_d"


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="vera",
        title="VeRA",
        summary="two vectors per projection around shared random matrices",
        paper="https://arxiv.org/abs/2310.11454",
        peft_type="VERA",
        config_class=VeRAConfig,
        ignored_keys=frozenset({"fan_in_fan_out"}),
        file_defaults=AS_PEFT,
        merges=True,
        in_peft=True,
        learning_rate=1e-2,
        learning_rate_source="Kopiczko et al. 2023, table 8: 2e-3 to 3e-2, ten times LoRA's and more",
    )
