"""RED: what every feed-forward adds to the residual stream is scaled and shifted, feature by feature.

Wu et al. 2024, https://arxiv.org/abs/2402.15179.

    y = l * FFN(x) + b,   l, b [hidden];   fresh: l = 1, b = 0

Served as `Edit`, an op of this package. Merged into the feed-forward's last projection (W0, b0):
W = diag(l) W0, b' = l * b0 + b.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux import hookimpl
from deltamux.deltas import BaseModel, BlockRole, BlockSite, LinearSite, Program, SiteKind
from deltamux.errors import InvalidConfigError, NotMergeableError
from deltamux.hookspecs import MethodInfo, ParameterSpec
from deltamux_red.edit import Edit


@dataclass(frozen=True)
class REDConfig:
    """RED has no options but the version of its files: every feed-forward is edited."""

    format_version: int = 1

    def __post_init__(self) -> None:
        if self.format_version != 1:
            raise InvalidConfigError(
                f"format_version {self.format_version} is not known here; known: 1",
                metadata={"field": "format_version"},
            )


@hookimpl
def deltamux_parameters(config: REDConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    parameters: dict[str, ParameterSpec] = {}
    for block in _feed_forwards(base):
        parameters[f"{block.name}.factor"] = ParameterSpec((block.features,), torch.nn.init.ones_)
        parameters[f"{block.name}.bias"] = ParameterSpec((block.features,), torch.nn.init.zeros_)
    return parameters


@hookimpl
def deltamux_program(config: REDConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    return Program.of(
        (block.name, Edit(tensors[f"{block.name}.factor"], tensors[f"{block.name}.bias"]))
        for block in _feed_forwards(base)
    )


@hookimpl
def deltamux_merge(config: REDConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for block in _feed_forwards(base):
        site = base.site(SiteKind.LINEAR, block.output_module)
        assert isinstance(site, LinearSite)
        if not site.has_bias:
            raise NotMergeableError(
                f"{site.name} of the base model has no bias that could hold the adapter's; serve it as an adapter",
                metadata={"site": site.name},
            )
        factor, bias = tensors[f"{block.name}.factor"].float(), tensors[f"{block.name}.bias"].float()
        weight, own_bias = base.tensor(f"{site.name}.weight"), base.tensor(f"{site.name}.bias")
        scaled = weight.float() * (factor if site.transposed else factor.unsqueeze(1))
        merged[f"{site.name}.weight"] = scaled.to(weight.dtype)
        merged[f"{site.name}.bias"] = (own_bias.float() * factor + bias).to(own_bias.dtype)
    return merged


def _feed_forwards(base: BaseModel) -> list[BlockSite]:
    return [block for block in base.blocks if block.role is BlockRole.FEED_FORWARD]


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="red",
        title="RED",
        summary="a factor and a bias after every feed-forward",
        paper="https://arxiv.org/abs/2402.15179",
        peft_type="RED",
        config_class=REDConfig,
        merges=True,
        in_peft=False,
        learning_rate=3e-3,
        learning_rate_source="of the order of IA3's, which trains as few parameters",
    )
