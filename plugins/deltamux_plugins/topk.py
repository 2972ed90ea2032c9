"""Top-layer tuning: every weight of the last k decoder layers is trained, the layers below stay frozen.

Howard & Ruder 2018, https://arxiv.org/abs/1801.06146 (tuning from the top).

    W' = W + dW,  b' = b + db    in layers L-k .. L-1, norms included

The base's own weights are trained, as in plain fine-tuning; the changes are computed at the end.

Served as `Dense`, `Bias` and `NormAffine`; compressed by ``deltamux compress`` as `SignDense` or `LowRank`. The files
hold the changes; PEFT has no such method.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from deltamux.deltas import BaseModel, Program
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import VersionedConfig, invalid
from deltamux_plugins.dense_format import Change, dense_program, layer_changes, outer_changes, zeros


@dataclass(frozen=True)
class TopKConfig(VersionedConfig):
    """The layers that are trained.

    Attributes:
        num_layers: k, counted from the top; None trains all layers.
        train_norms: whether the layers' norms are trained, too, and the norm after the last layer.
    """

    num_layers: int | None = 1
    train_norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers is not None and self.num_layers < 1:
            raise invalid("num_layers", f"is at least 1, not {self.num_layers}")


# Train.


@hookimpl
def deltamux_parameters(config: TopKConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    return zeros(_changes(config, base))


@hookimpl
def deltamux_weights(config: TopKConfig, base: BaseModel) -> dict[str, str]:
    return {change.name: change.name for change in _changes(config, base)}


@hookimpl
def deltamux_config(config: TopKConfig, base: BaseModel) -> dict[str, Any]:
    layers = base.dims.num_layers if config.num_layers is None else min(config.num_layers, base.dims.num_layers)
    return {**asdict(config), "num_layers": layers, "task_type": "CAUSAL_LM"}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: TopKConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    return dense_program(base, _changes(config, base), tensors)


def _changes(config: TopKConfig, base: BaseModel) -> list[Change]:
    count = base.dims.num_layers if config.num_layers is None else min(config.num_layers, base.dims.num_layers)
    layers = range(base.dims.num_layers - count, base.dims.num_layers)
    norms = outer_changes(base, embedding=False, final_norm=config.train_norms, head=False)
    return [*layer_changes(base, layers, norms=config.train_norms), *norms]


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="topk",
        title="Top-layer tuning",
        summary="every weight of the last k layers (or of all)",
        paper="https://arxiv.org/abs/1801.06146",
        peft_type="DELTAMUX_TOPK",
        config_class=TopKConfig,
        merges=True,
        in_peft=False,
        learning_rate=2e-5,
        learning_rate_source="Llama 2 (arXiv:2307.09288), section 3.1: 2e-5; ten times below LoRA's",
        learning_rate_width=4096,
    )
