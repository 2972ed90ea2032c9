"""UniPELT: LoRA, a prefix and bottlenecks in one adapter, each with a trained gate.

Mao et al. 2022, https://arxiv.org/abs/2110.07577.

    LoRA at the attention's queries and values:      y += sigmoid(g . x + c) * s B (A x)
    bottleneck after every feed-forward:             y += sigmoid(g . y + c) * bottleneck(y)
    prefix before every attention:                   K = [sigmoid(p) * P_K; K],  V = [sigmoid(p) * P_V; V]

The paper gates a whole sequence by the average over its tokens. A decoder cannot: a prompt's average is not that of the
prompt and its answer, so a cache filled with the one would be wrong for the other. Here the gates of LoRA and of the
bottleneck are computed per token, from the paper's input and by its formula without the average. The prefix is in the
cache before any token is known: its gate is one trained number per layer, multiplied into the keys and values of the
program.

Served as `GatedLowRank`, `GatedBottleneck` and `KVPrefix`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltamux import hookimpl
from deltamux.deltas import BaseModel, Bottleneck, GatedBottleneck, GatedLowRank, KVPrefix, LowRank, Op
from deltamux.errors import InvalidConfigError
from deltamux.hookspecs import MethodInfo, ParameterSpec
from deltamux_plugins import lora, pfeiffer, prefix
from deltamux_plugins.bottlenecks import BottleneckConfig
from deltamux_plugins.composites import CompositeMethod
from deltamux_plugins.configs import VersionedConfig
from deltamux_plugins.lora import LoRAConfig
from deltamux_plugins.prefix import PrefixConfig
from deltamux_plugins.targets import targets

QUERIES_AND_VALUES = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")


@dataclass(frozen=True)
class UniPELTConfig(VersionedConfig):
    """The configs of the three components; LoRA without magnitudes and biases."""

    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(target_modules=QUERIES_AND_VALUES))
    prefix: PrefixConfig = field(default_factory=lambda: PrefixConfig(num_virtual_tokens=10, prefix_projection=True))
    adapter: BottleneckConfig = field(default_factory=BottleneckConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora.use_dora or self.lora.bias != "none":
            raise InvalidConfigError(
                "UniPELT's LoRA has neither magnitudes (use_dora) nor biases", metadata={"field": "lora"}
            )
        if self.lora.target_parameters:
            raise InvalidConfigError(
                "UniPELT's LoRA has a gate at every projection, and target_parameters names other targets",
                metadata={"field": "lora"},
            )


class UniPELT(CompositeMethod):
    """A `CompositeMethod` with a gate for every op."""

    @hookimpl
    def deltamux_parameters(self, config: UniPELTConfig, base: BaseModel) -> dict[str, ParameterSpec]:
        def small(tensor: Tensor) -> None:
            torch.nn.init.normal_(tensor, std=0.02)

        parameters = super().deltamux_parameters(config, base)
        for name, features in _token_gates(config, base):
            parameters[f"{name}.weight"] = ParameterSpec((features,), small)
            parameters[f"{name}.bias"] = ParameterSpec((1,), torch.nn.init.zeros_)
        for site in base.attentions:
            parameters[_gate(site.name)] = ParameterSpec((1,), torch.nn.init.zeros_)
        return parameters

    def placements(
        self, config: UniPELTConfig, base: BaseModel, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Op]]:
        return ((site, _gated(site, op, tensors)) for site, op in super().placements(config, base, tensors))


def _token_gates(config: UniPELTConfig, base: BaseModel) -> Iterator[tuple[str, int]]:
    """Yields (name, features) of every gate that is computed per token."""
    yield from ((_gate(site.name), site.in_features) for site in targets(config.lora, base))
    yield from ((_gate(block.name), block.features) for block in pfeiffer.METHOD.blocks(base))


def _gated(site: str, op: Op, tensors: Mapping[str, Tensor]) -> Op:
    name = _gate(site)
    if isinstance(op, KVPrefix):
        opening = torch.sigmoid(tensors[name])
        return KVPrefix(op.key * opening, op.value * opening)
    arguments = {**vars(op), "gate_weight": tensors[f"{name}.weight"], "gate_bias": tensors[f"{name}.bias"]}
    assert isinstance(op, LowRank | Bottleneck)
    return GatedLowRank(**arguments) if isinstance(op, LowRank) else GatedBottleneck(**arguments)


def _gate(site: str) -> str:
    return f"gates.{site}"


METHOD = UniPELT(
    MethodInfo(
        name="unipelt",
        title="UniPELT",
        summary="LoRA, prefix and bottlenecks, each with a learned gate",
        paper="https://arxiv.org/abs/2110.07577",
        peft_type="DELTAMUX_UNIPELT",
        config_class=UniPELTConfig,
        merges=False,
        in_peft=False,
        learning_rate=5e-4,
        learning_rate_source="Mao et al. 2022, section 4.1: 5e-4",
        learning_rate_width=768,
    ),
    {"lora": lora, "adapter": pfeiffer.METHOD, "prefix": prefix},
    not_merged="its gates depend on the token, and its prefix and bottlenecks are not changes of weights",
)
