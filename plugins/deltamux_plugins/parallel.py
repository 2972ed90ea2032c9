"""The parallel adapter (He et al. 2021, https://arxiv.org/abs/2110.04366): a bottleneck beside every feed-forward.

    y += s (W_up f(W_down x + b_down) + b_up)   with x the feed-forward's input, so that both run side by side

Served as one parallel `Bottleneck` a layer. The paper scales by s = 4 and uses ReLU.
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
class ParallelConfig(HoulsbyConfig):
    """See `HoulsbyConfig`; norms are not trained, and scale and activation are the paper's."""

    activation: str = "relu"
    scale: float = 4.0
    train_norms: bool = False


@hookimpl
def deltamux_parameters(config: ParallelConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    return bottleneck_parameters(config, base, ROLES)


@hookimpl
def deltamux_config(config: ParallelConfig, base: BaseModel) -> dict[str, Any]:
    return {**asdict(config), "bottleneck": config.width(base.dims.hidden_size), "task_type": "CAUSAL_LM"}


@hookimpl
def deltamux_merge(config: ParallelConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise refuse_to_merge(config.activation)


@hookimpl
def deltamux_program(config: ParallelConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    return Program.of(bottlenecks(config, base, tensors, ROLES, parallel=True))


@hookimpl
def deltamux_recognise(checkpoint: Checkpoint) -> Checkpoint | None:
    return adapterhub.recognise(checkpoint, "DELTAMUX_PARALLEL")


@hookimpl
def deltamux_method() -> MethodInfo:
    info = houlsby.deltamux_method()
    return MethodInfo(
        name="parallel",
        title="Parallel adapter",
        summary="a bottleneck beside the feed-forward of every layer",
        paper="https://arxiv.org/abs/2110.04366",
        peft_type="DELTAMUX_PARALLEL",
        config_class=ParallelConfig,
        ignored_keys=BOOKKEEPING,
        merges=False,
        in_peft=False,
        learning_rate=info.learning_rate,
        learning_rate_source=info.learning_rate_source,
        learning_rate_width=info.learning_rate_width,
    )
