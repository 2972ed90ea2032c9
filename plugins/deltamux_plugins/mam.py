"""The MAM adapter (He et al. 2021, https://arxiv.org/abs/2110.04366): a prefix, and a parallel adapter beside it.

A method made of methods: `prefix` in front of every attention, `parallel` beside every feed-forward. It holds the
configs of both, and hands every hook on to them. The tensors of the parts keep their names, behind ``prefix.`` and
``parallel.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from deltamux.deltas import BaseModel, Program
from deltamux.deltas.composition import ComponentTensors
from deltamux.errors import NotMergeableError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins import parallel, prefix
from deltamux_plugins.parallel import ParallelConfig
from deltamux_plugins.peft_format import BOOKKEEPING
from deltamux_plugins.prefix import PrefixConfig

FORMAT_VERSION = 1


@dataclass(frozen=True)
class MAMConfig:
    """The configs of both parts."""

    prefix: PrefixConfig = field(default_factory=lambda: PrefixConfig(prefix_projection=True))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    format_version: int = FORMAT_VERSION


# Train.


@hookimpl
def deltamux_parameters(config: MAMConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    return {
        **_behind("prefix", prefix.deltamux_parameters(config.prefix, base)),
        **_behind("parallel", parallel.deltamux_parameters(config.parallel, base)),
    }


@hookimpl
def deltamux_export(config: MAMConfig, base: BaseModel, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    exported = prefix.deltamux_export(config.prefix, base, ComponentTensors("prefix", parameters))
    beside = {name: tensor for name, tensor in parameters.items() if name.startswith("parallel.")}
    return {**_behind("prefix", exported), **beside}


@hookimpl
def deltamux_config(config: MAMConfig, base: BaseModel) -> dict[str, Any]:
    own = {f.name for f in fields(PrefixConfig)}
    described = {k: v for k, v in prefix.deltamux_config(config.prefix, base).items() if k in own}
    return {**asdict(config), "prefix": described, "task_type": "CAUSAL_LM"}


# Merge.


@hookimpl
def deltamux_merge(config: MAMConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise NotMergeableError(
        "a MAM adapter cannot be merged: neither its prefix nor its bottlenecks are changes of weights. Serve it as an "
        "adapter, or train LoRA instead"
    )


# Inference.


@hookimpl
def deltamux_program(config: MAMConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    parts = (
        prefix.deltamux_program(config.prefix, base, ComponentTensors("prefix", tensors)),
        parallel.deltamux_program(config.parallel, base, ComponentTensors("parallel", tensors)),
    )
    return Program.of(placement for part in parts for placement in part)


def _behind(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part's tensors or declarations under the whole's names."""
    return {f"{name}.{key}": value for key, value in values.items()}


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="mam",
        title="MAM adapter",
        summary="prefix in front of every attention, bottleneck beside every feed-forward",
        paper="https://arxiv.org/abs/2110.04366",
        peft_type="DELTAMUX_MAM",
        config_class=MAMConfig,
        ignored_keys=BOOKKEEPING,
        merges=False,
        in_peft=False,
        learning_rate=2e-3,
        learning_rate_source="between its parts': adapters 1e-3, prefixes 5e-3",
        learning_rate_width=1024,
    )
