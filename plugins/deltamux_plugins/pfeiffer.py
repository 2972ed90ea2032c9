"""Adapter tuning after Pfeiffer et al. 2021 (https://arxiv.org/abs/2005.00247): one bottleneck a layer.

    y += s (W_up f(W_down y + b_down) + b_up)   after the feed-forward of every layer; norms stay as they are

Served as one `Bottleneck` a layer. The files are those of `houlsby`, with half of its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from deltamux.deltas import BaseModel, BlockRole, Checkpoint, Program
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins import adapterhub, houlsby
from deltamux_plugins.houlsby import HoulsbyConfig, bottleneck_parameters, bottlenecks, refuse_to_merge
from deltamux_plugins.peft_format import BOOKKEEPING

ROLES = (BlockRole.FEED_FORWARD,)


@dataclass(frozen=True)
class PfeifferConfig(HoulsbyConfig):
    """See `HoulsbyConfig`; norms are not trained."""

    train_norms: bool = False


@hookimpl
def deltamux_parameters(config: PfeifferConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    return bottleneck_parameters(config, base, ROLES)


@hookimpl
def deltamux_config(config: PfeifferConfig, base: BaseModel) -> dict[str, Any]:
    return {**asdict(config), "bottleneck": config.width(base.dims.hidden_size), "task_type": "CAUSAL_LM"}


@hookimpl
def deltamux_merge(config: PfeifferConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise refuse_to_merge(config.activation)


@hookimpl
def deltamux_program(config: PfeifferConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    return Program.of(bottlenecks(config, base, tensors, ROLES))


@hookimpl
def deltamux_recognise(checkpoint: Checkpoint) -> Checkpoint | None:
    return adapterhub.recognise(checkpoint, "DELTAMUX_PFEIFFER")


@hookimpl
def deltamux_method() -> MethodInfo:
    info = houlsby.deltamux_method()
    return MethodInfo(
        name="pfeiffer",
        title="Adapter tuning (Pfeiffer)",
        summary="a bottleneck after the feed-forward of every layer",
        paper="https://arxiv.org/abs/2005.00247",
        peft_type="DELTAMUX_PFEIFFER",
        config_class=PfeifferConfig,
        ignored_keys=BOOKKEEPING,
        merges=False,
        in_peft=False,
        learning_rate=info.learning_rate,
        learning_rate_source=info.learning_rate_source,
        learning_rate_width=info.learning_rate_width,
    )
