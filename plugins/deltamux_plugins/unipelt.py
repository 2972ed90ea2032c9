"""UniPELT: LoRA, a prefix and bottlenecks in one adapter, each behind a gate that learns where it helps.

Mao et al. 2022, https://arxiv.org/abs/2110.07577.

    LoRA at the attention's queries and values:      y += sigmoid(g . x + c) * s B (A x)
    bottleneck after every feed-forward:             y += sigmoid(g . y + c) * bottleneck(y)
    prefix in front of every attention:              K = [sigmoid(p) * P_K; K],  V = [sigmoid(p) * P_V; V]

The paper gates a whole sequence by the average over its tokens. A decoder cannot: a prompt's average is not that of the
prompt and its answer, so a cache filled with the one would be wrong for the other. Here the gates of LoRA and of the
bottleneck are opened by every token for itself, from the paper's input and by its formula without the average.
The prefix stands in the cache before any token is known: its gate is one learned number a layer, and is folded into the
keys and values on the way to the engine.

Served as `GatedLowRank`, `GatedBottleneck` and `KVPrefix`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, Bottleneck, GatedBottleneck, GatedLowRank, KVPrefix, LowRank, Op, Program
from deltamux.deltas.composition import ComponentTensors
from deltamux.errors import InvalidConfigError, NotMergeableError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins import lora, pfeiffer, prefix
from deltamux_plugins.lora import LoRAConfig
from deltamux_plugins.peft_format import BOOKKEEPING
from deltamux_plugins.pfeiffer import PfeifferConfig
from deltamux_plugins.prefix import PrefixConfig
from deltamux_plugins.targets import targets

FORMAT_VERSION = 1
QUERIES_AND_VALUES = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")


@dataclass(frozen=True)
class UniPELTConfig:
    """The configs of the three parts; LoRA without magnitudes and biases."""

    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(target_modules=QUERIES_AND_VALUES))
    prefix: PrefixConfig = field(default_factory=lambda: PrefixConfig(num_virtual_tokens=10, prefix_projection=True))
    adapter: PfeifferConfig = field(default_factory=PfeifferConfig)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.lora.use_dora or self.lora.bias != "none":
            raise InvalidConfigError(
                "UniPELT's LoRA has neither magnitudes (use_dora) nor biases", metadata={"field": "lora"}
            )
        if self.format_version != FORMAT_VERSION:
            raise InvalidConfigError(f"format_version {self.format_version} is not known here; known: {FORMAT_VERSION}")


# Train.


@hookimpl
def deltamux_parameters(config: UniPELTConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    def small(tensor: Tensor) -> None:
        torch.nn.init.normal_(tensor, std=0.02)

    parameters = {
        **_behind("lora", lora.deltamux_parameters(config.lora, base)),
        **_behind("prefix", prefix.deltamux_parameters(config.prefix, base)),
        **_behind("adapter", pfeiffer.deltamux_parameters(config.adapter, base)),
    }
    for name, features in _token_gates(config, base):
        parameters[f"{name}.weight"] = ParameterSpec((features,), small)
        parameters[f"{name}.bias"] = ParameterSpec((1,), torch.nn.init.zeros_)
    for site in base.attentions:
        parameters[_gate(site.name)] = ParameterSpec((1,), torch.nn.init.zeros_)
    return parameters


def _token_gates(config: UniPELTConfig, base: BaseModel) -> Iterator[tuple[str, int]]:
    """Yields (name, features) of every gate that each token opens for itself."""
    yield from ((_gate(site.name), site.in_features) for site in targets(config.lora, base))
    yield from ((_gate(block.name), block.features) for block in base.blocks if block.role in pfeiffer.ROLES)


@hookimpl
def deltamux_export(config: UniPELTConfig, base: BaseModel, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    exported = prefix.deltamux_export(config.prefix, base, ComponentTensors("prefix", parameters))
    others = {name: tensor for name, tensor in parameters.items() if not name.startswith("prefix.")}
    return {**_behind("prefix", exported), **others}


@hookimpl
def deltamux_config(config: UniPELTConfig, base: BaseModel) -> dict[str, Any]:
    own = {f.name for f in fields(PrefixConfig)}
    described = {k: v for k, v in prefix.deltamux_config(config.prefix, base).items() if k in own}
    return {**asdict(config), "prefix": described, "task_type": "CAUSAL_LM"}


# Merge.


@hookimpl
def deltamux_merge(config: UniPELTConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise NotMergeableError(
        "a UniPELT adapter cannot be merged: its gates depend on the token, and its prefix and bottlenecks are no "
        "changes of weights. Serve it as an adapter, or train LoRA instead"
    )


# Inference.


@hookimpl
def deltamux_program(config: UniPELTConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    parts = (
        lora.deltamux_program(config.lora, base, ComponentTensors("lora", tensors)),
        pfeiffer.deltamux_program(config.adapter, base, ComponentTensors("adapter", tensors)),
        prefix.deltamux_program(config.prefix, base, ComponentTensors("prefix", tensors)),
    )
    return Program.of((site, _gated(site, op, tensors)) for part in parts for site, op in part)


def _gated(site: str, op: Op, tensors: Mapping[str, Tensor]) -> Op:
    name = _gate(site)
    if isinstance(op, KVPrefix):
        opening = torch.sigmoid(tensors[name])
        return KVPrefix(op.key * opening, op.value * opening)
    parts = {**vars(op), "gate_weight": tensors[f"{name}.weight"], "gate_bias": tensors[f"{name}.bias"]}
    assert isinstance(op, LowRank | Bottleneck)
    return GatedLowRank(**parts) if isinstance(op, LowRank) else GatedBottleneck(**parts)


def _gate(site: str) -> str:
    return f"gates.{site}"


def _behind(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part's tensors or declarations under the whole's names."""
    return {f"{name}.{key}": value for key, value in values.items()}


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="unipelt",
        title="UniPELT",
        summary="LoRA, prefix and bottlenecks, each behind a learned gate",
        paper="https://arxiv.org/abs/2110.07577",
        peft_type="DELTAMUX_UNIPELT",
        config_class=UniPELTConfig,
        ignored_keys=BOOKKEEPING,
        merges=False,
        in_peft=False,
        learning_rate=5e-4,
        learning_rate_source="Mao et al. 2022, section 4.1: 5e-4",
        learning_rate_width=768,
    )
