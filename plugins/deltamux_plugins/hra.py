"""HRA: the inputs of a projection are reflected at a few trained hyperplanes.

Yuan et al. 2024, https://arxiv.org/abs/2405.17484.

    y = W H x + b,   H = (I - 2 u_1 u_1^T) .. (I - 2 u_r u_r^T),   u_i [in] of length one

Served exactly as `LowRank` of rank r: H - I = C U^T with C = -U (striu(U^T U) + I / 2)^-1, the compact WY form of a
product of reflections (Schreiber & Van Loan 1989), so W H x = W x + (W C)(U^T x). Files are PEFT's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, LinearSite, LowRank, Program
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import check_no_bias, invalid
from deltamux_plugins.peft_format import AS_PEFT, PREFIX, refuse_to_train, shaped
from deltamux_plugins.targets import Targeted, peft_values, targets


@dataclass(frozen=True)
class HRAConfig(Targeted):
    """PEFT's HRAConfig.

    Attributes:
        r: number of reflections; even in training, where they begin in pairs that cancel each other.
        apply_GS: whether the hyperplanes are made orthogonal (Gram-Schmidt) before they reflect.
        bias: none; adapters whose biases were trained are not served.
        init_weights: whether a fresh adapter is the identity.
    """

    r: int = 8
    apply_GS: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise invalid("r", f"is positive, not {self.r}")
        check_no_bias(self.bias)


# Train.


@hookimpl
def deltamux_parameters(config: HRAConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    refuse_to_train(config, "modules_to_save")
    if config.r % 2 or (config.apply_GS and config.init_weights):
        raise invalid(
            "r", "is even in training, and without apply_GS: only equal pairs of reflections begin as the identity"
        )

    def init(tensor: Tensor) -> None:
        torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        if config.init_weights:
            tensor[:, 1::2] = tensor[:, ::2]

    return {_name(site): ParameterSpec((site.in_features, config.r), init) for site in targets(config, base)}


@hookimpl
def deltamux_config(config: HRAConfig, base: BaseModel) -> dict[str, Any]:
    return peft_values(config, base)


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: HRAConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    def change(site: LinearSite) -> LowRank:
        directions = shaped(tensors, _name(site), (site.in_features, config.r), base)
        u, c = _orthogonal(directions) if config.apply_GS else _reflections(directions)
        weight = base.tensor(f"{site.name}.weight").to(u)
        return LowRank(u.t(), (weight.t() if site.transposed else weight) @ c)

    return Program.of((site.name, change(site)) for site in targets(config, base))


def _reflections(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns U and C [in, r] with H = I + C U^T, of one reflection after the other (compact WY form)."""
    u = directions / directions.norm(dim=0)
    halves = 0.5 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    return u, torch.linalg.solve_triangular(torch.triu(u.t() @ u, 1) + halves, -u, upper=True, left=False)


def _orthogonal(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns U and C [in, r] with H = I + C U^T, of reflections at orthogonal hyperplanes: H = I - 2 Q Q^T."""
    columns: list[Tensor] = []
    for direction in directions.unbind(1):
        for other in columns:
            direction = direction - (other @ direction) * other
        columns.append(direction / direction.norm())
    q = torch.stack(columns, dim=1)
    return q, -2 * q


def _name(site: LinearSite) -> str:
    return f"{PREFIX}{site.name}.hra_u"


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="hra",
        title="HRA",
        summary="Householder reflections of the inputs of chosen projections",
        paper="https://arxiv.org/abs/2405.17484",
        peft_type="HRA",
        config_class=HRAConfig,
        file_defaults=AS_PEFT,
        merges=True,
        in_peft=True,
        learning_rate=1e-3,
        learning_rate_source="Yuan et al. 2024, appendix: 1e-3 to 4e-3 on GLUE",
        learning_rate_width=768,
    )
