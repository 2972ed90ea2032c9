"""Adapter tuning: a bottleneck after attention and after the feed-forward of every layer; layer norms are trained too.

Houlsby et al. 2019, https://arxiv.org/abs/1902.00751.

    y += s (W_up f(W_down y + b_down) + b_up),   W_down [m, d], W_up [d, m];   norms: weight and bias change

Served as two `Bottleneck` a layer and a `NormAffine` at every norm. PEFT has no such method: the files have PEFT's
layout, with tensor names that do not depend on the architecture's module paths, except for the norms'.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, BlockRole, Bottleneck, Checkpoint, NormAffine, Op, Program
from deltamux.deltas.ops.bottleneck import ACTIVATIONS
from deltamux.errors import InvalidAdapterError, InvalidConfigError, NotMergeableError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins import adapterhub

FORMAT_VERSION = 1
ROLES = (BlockRole.ATTENTION, BlockRole.FEED_FORWARD)


@dataclass(frozen=True)
class HoulsbyConfig:
    """What an adapter is made of.

    Attributes:
        bottleneck: inner width m; None derives it from reduction_factor.
        reduction_factor: hidden size divided by m, where bottleneck is None.
        activation: f, one of deltamux.deltas.ops.bottleneck.ACTIVATIONS.
        scale: s, what the change is multiplied by.
        reads_residual: whether W_down reads the residual stream that y was added to (in a parallel adapter: in front of
            the sub-layer's norm), as AdapterHub places its Pfeiffer and parallel adapters.
        train_norms: whether the norms' weights (and biases, where the base has them) change.
        format_version: of the files.
    """

    bottleneck: int | None = None
    reduction_factor: float = 16
    activation: str = "gelu"
    scale: float = 1.0
    train_norms: bool = True
    reads_residual: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.bottleneck is not None and not (isinstance(self.bottleneck, int) and self.bottleneck > 0):
            raise _invalid("bottleneck", f"is a positive integer, not {self.bottleneck!r}")
        if self.reduction_factor <= 0:
            raise _invalid("reduction_factor", f"is positive, not {self.reduction_factor}")
        if self.activation not in ACTIVATIONS:
            raise _invalid("activation", f"is one of {', '.join(sorted(ACTIVATIONS))}, not {self.activation!r}")
        if self.format_version != FORMAT_VERSION:
            raise _invalid("format_version", f"{self.format_version} is not known here; known: {FORMAT_VERSION}")

    def width(self, hidden_size: int) -> int:
        return self.bottleneck or max(1, int(hidden_size / self.reduction_factor))


# Train.


@hookimpl
def deltamux_parameters(config: HoulsbyConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    zeros, parameters = torch.nn.init.zeros_, bottleneck_parameters(config, base, ROLES)
    for norm in base.norms if config.train_norms else ():
        parameters[f"norms.{norm.name}.weight"] = ParameterSpec((norm.features,), zeros)
        if norm.has_bias:
            parameters[f"norms.{norm.name}.bias"] = ParameterSpec((norm.features,), zeros)
    return parameters


def bottleneck_parameters(
    config: HoulsbyConfig, base: BaseModel, roles: Collection[BlockRole]
) -> dict[str, ParameterSpec]:
    """Returns the parameters of one bottleneck at every sub-layer of the given roles."""
    zeros, parameters = torch.nn.init.zeros_, dict[str, ParameterSpec]()
    for block in (block for block in base.blocks if block.role in roles):
        width = config.width(block.features)
        # The paper starts near the identity; a zero W_up starts at it, and learns as well since W_down is not zero.
        parameters[f"{block.name}.down.weight"] = ParameterSpec((width, block.features), _small_normal)
        parameters[f"{block.name}.down.bias"] = ParameterSpec((width,), zeros)
        parameters[f"{block.name}.up.weight"] = ParameterSpec((block.features, width), zeros)
        parameters[f"{block.name}.up.bias"] = ParameterSpec((block.features,), zeros)
    return parameters


def _small_normal(tensor: Tensor) -> Tensor:
    return torch.nn.init.normal_(tensor, std=tensor.shape[1] ** -0.5)


@hookimpl
def deltamux_config(config: HoulsbyConfig, base: BaseModel) -> dict[str, Any]:
    return {**asdict(config), "bottleneck": config.width(base.dims.hidden_size), "task_type": "CAUSAL_LM"}


# Merge.


@hookimpl
def deltamux_merge(config: HoulsbyConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise refuse_to_merge(config.activation)


def refuse_to_merge(activation: str) -> NotMergeableError:
    return NotMergeableError(
        f"adapter tuning cannot be merged: its bottlenecks hold a nonlinearity ({activation}) between two projections, "
        "which no weight of the base can express. Serve it as an adapter, or train LoRA instead"
    )


# Inference.


@hookimpl
def deltamux_program(config: HoulsbyConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    rows = bottlenecks(config, base, tensors, ROLES)
    for norm in base.norms if config.train_norms else ():
        bias = tensors[f"norms.{norm.name}.bias"] if norm.has_bias else None
        rows.append((norm.name, NormAffine(tensors[f"norms.{norm.name}.weight"], bias)))
    return Program.of(rows)


def bottlenecks(
    config: HoulsbyConfig,
    base: BaseModel,
    tensors: Mapping[str, Tensor],
    roles: Collection[BlockRole],
    *,
    parallel: bool = False,
) -> list[tuple[str, Op]]:
    """Returns one bottleneck at every sub-layer of the given roles.

    Raises:
        InvalidAdapterError: the tensors have another width than the config.
    """
    for block in base.blocks:
        # A converted adapter may have a width of its own at every sub-layer: then its config names none.
        down = tensors[f"{block.name}.down.weight"] if block.role in roles and config.bottleneck else None
        if down is not None and (down.dim() != 2 or down.shape[0] != config.bottleneck):
            raise InvalidAdapterError(
                f"{block.name}.down.weight has shape {list(down.shape)}, but adapter_config.json says width "
                f"{config.bottleneck}",
                reason="RANK_MISMATCH",
                metadata={"tensor": f"{block.name}.down.weight"},
            )
    return [
        (
            block.name,
            Bottleneck(
                down_weight=tensors[f"{block.name}.down.weight"],
                down_bias=tensors[f"{block.name}.down.bias"],
                up_weight=tensors[f"{block.name}.up.weight"],
                up_bias=tensors[f"{block.name}.up.bias"],
                activation=config.activation,
                scale=config.scale,
                parallel=parallel,
                residual=config.reads_residual,
            ),
        )
        for block in base.blocks
        if block.role in roles
    ]


def _invalid(name: str, problem: str) -> InvalidConfigError:
    return InvalidConfigError(f"{name} {problem}", metadata={"field": name})


@hookimpl
def deltamux_recognise(checkpoint: Checkpoint) -> Checkpoint | None:
    return adapterhub.recognise(checkpoint, "DELTAMUX_HOULSBY")


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="houlsby",
        title="Adapter tuning (Houlsby)",
        summary="bottlenecks after attention and feed-forward of every layer; norms trained",
        paper="https://arxiv.org/abs/1902.00751",
        peft_type="DELTAMUX_HOULSBY",
        config_class=HoulsbyConfig,
        ignored_keys=frozenset({"task_type", "base_model_name_or_path"}),
        merges=False,
        in_peft=False,
        learning_rate=1e-3,
        learning_rate_source="within the sweep of Houlsby et al. 2019, section 3.2: 3e-5 to 3e-3",
        learning_rate_width=1024,
    )
