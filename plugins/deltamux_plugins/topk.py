"""Top-layer tuning: every weight of the last k decoder layers is trained, the layers below stay frozen.

Howard & Ruder 2018, https://arxiv.org/abs/1801.06146 (tuning from the top); with k the number of layers, it is the
full tuning of all layers (embeddings and output head stay as they are).

    W' = W + dW,  b' = b + db    in layers L-k .. L-1, norms included

Served as `Dense`, `Bias` and `NormAffine`. The files hold the changes, in PEFT's layout; PEFT has no such method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, Bias, Dense, LinearSite, NormAffine, NormSite, Op, Program
from deltamux.errors import InvalidConfigError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.peft_format import BOOKKEEPING

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TopKConfig:
    """Which layers are trained.

    Attributes:
        num_layers: k, counted from the top; None trains all layers.
        train_norms: whether the layers' norms are trained, too, and the norm behind the last layer.
    """

    num_layers: int | None = 1
    train_norms: bool = True
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise InvalidConfigError(
                f"num_layers is at least 1, not {self.num_layers}", metadata={"field": "num_layers"}
            )
        if self.format_version != FORMAT_VERSION:
            raise InvalidConfigError(f"format_version {self.format_version} is not known here; known: {FORMAT_VERSION}")


# Train.


@hookimpl
def deltamux_parameters(config: TopKConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    return {name: ParameterSpec(shape, torch.nn.init.zeros_) for _, _, name, shape in _changes(config, base)}


@hookimpl
def deltamux_config(config: TopKConfig, base: BaseModel) -> dict[str, Any]:
    layers = base.dims.num_layers if config.num_layers is None else min(config.num_layers, base.dims.num_layers)
    return {**asdict(config), "num_layers": layers, "task_type": "CAUSAL_LM"}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: TopKConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    rows: list[tuple[str, Op]] = []
    for site, field, name, _ in _changes(config, base):
        change = tensors[name]
        if isinstance(site, NormSite):
            rows.append((site.name, NormAffine(**{field: change})))
        else:
            rows.append((site.name, Dense(change) if field == "weight" else Bias(change)))
    return Program.of(rows)


def _changes(config: TopKConfig, base: BaseModel) -> Iterator[tuple[LinearSite | NormSite, str, str, tuple[int, ...]]]:
    """Yields (site, parameter, tensor's name, shape) of everything that is trained."""
    first = 0 if config.num_layers is None else base.dims.num_layers - config.num_layers
    for site in base.linears:
        if site.layer >= first:
            yield site, "weight", f"{site.name}.weight", (site.out_features, site.in_features)
            if site.has_bias:
                yield site, "bias", f"{site.name}.bias", (site.out_features,)
    for norm in base.norms if config.train_norms else ():
        if norm.layer is None or norm.layer >= first:
            yield norm, "weight", f"{norm.name}.weight", (norm.features,)
            if norm.has_bias:
                yield norm, "bias", f"{norm.name}.bias", (norm.features,)


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="topk",
        title="Top-layer tuning",
        summary="every weight of the last k layers (or of all)",
        paper="https://arxiv.org/abs/1801.06146",
        peft_type="DELTAMUX_TOPK",
        config_class=TopKConfig,
        ignored_keys=BOOKKEEPING,
        merges=True,
        in_peft=False,
        learning_rate=2e-5,
        learning_rate_source="the usual rate of full fine-tuning; ten times below LoRA's",
    )
