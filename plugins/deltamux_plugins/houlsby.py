"""Adapter tuning: a bottleneck after attention and after the feed-forward of every layer; layer norms are trained too.

Houlsby et al. 2019, https://arxiv.org/abs/1902.00751.

    y += s (W_up f(W_down y + b_down) + b_up),   W_down [m, d], W_up [d, m];   norms: weight and bias change

Served as two `Bottleneck` per layer and a `NormAffine` at every norm. The files are those of `BottleneckMethod`, with
the changes of the norms by their paths.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux import hookimpl
from deltamux.deltas import BaseModel, BlockRole, NormAffine, Op
from deltamux.hookspecs import ParameterSpec
from deltamux_plugins.bottlenecks import BottleneckConfig, BottleneckMethod


@dataclass(frozen=True)
class HoulsbyConfig(BottleneckConfig):
    """A `BottleneckConfig` with trained norms."""

    train_norms: bool = True


class Houlsby(BottleneckMethod):
    """A `BottleneckMethod` that trains norms, too."""

    @hookimpl
    def deltamux_parameters(self, config: BottleneckConfig, base: BaseModel) -> dict[str, ParameterSpec]:
        zeros, parameters = torch.nn.init.zeros_, super().deltamux_parameters(config, base)
        for norm in base.norms if config.train_norms else ():
            parameters[f"norms.{norm.name}.weight"] = ParameterSpec((norm.features,), zeros)
            if norm.has_bias:
                parameters[f"norms.{norm.name}.bias"] = ParameterSpec((norm.features,), zeros)
        return parameters

    def placements(
        self, config: BottleneckConfig, base: BaseModel, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Op]]:
        yield from super().placements(config, base, tensors)
        for norm in base.norms if config.train_norms else ():
            bias = tensors[f"norms.{norm.name}.bias"] if norm.has_bias else None
            yield norm.name, NormAffine(tensors[f"norms.{norm.name}.weight"], bias)


METHOD = Houlsby(
    name="houlsby",
    title="Adapter tuning (Houlsby)",
    summary="bottlenecks after attention and feed-forward of every layer; norms trained",
    paper="https://arxiv.org/abs/1902.00751",
    roles=(BlockRole.ATTENTION, BlockRole.FEED_FORWARD),
    config_class=HoulsbyConfig,
)
