"""Full fine-tuning: every weight is trained; the change against the base is stored and served.

    W' = W + dW,  b' = b + db,  E' = E + dE    everywhere, the embedding and the output head included

With `unfreeze`, layer by layer from the top (gradual unfreezing: Howard & Ruder 2018, section 3.3,
https://arxiv.org/abs/1801.06146): the run is cut into equal stages; the first trains what is above the layers, each
further one adds the next group of layers below, and the last one the embedding, too.

The base's own weights are trained, as in plain fine-tuning; the changes are computed at the end.

Served as `Dense`, `Bias`, `NormAffine`, `DenseEmbedding` and `DenseHead`; compressed by ``deltamux compress`` as
`SignDense` or `LowRank`. The files hold the changes; PEFT has no such method. Learned position embeddings (GPT-2, OPT)
stay as they are.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from deltamux.deltas import BaseModel, Program
from deltamux.hookspecs import MethodInfo, ParameterSpec, TrainingSchedule, hookimpl
from deltamux_plugins.configs import VersionedConfig, invalid
from deltamux_plugins.dense_format import Change, dense_program, layer_changes, outer_changes, zeros


@dataclass(frozen=True)
class FullConfig(VersionedConfig):
    """The parameters that are trained, and their schedule.

    Attributes:
        train_embedding: whether the input embedding is trained (with a tied output head).
        train_head: whether an untied output head is trained.
        unfreeze: train layer by layer from the top instead of all at once.
        layers_per_stage: how many layers are added at each stage of `unfreeze`.
    """

    train_embedding: bool = True
    train_head: bool = True
    unfreeze: bool = False
    layers_per_stage: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_per_stage < 1:
            raise invalid("layers_per_stage", f"is at least 1, not {self.layers_per_stage}")


# Train.


@hookimpl
def deltamux_parameters(config: FullConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    return zeros(_changes(config, base))


@hookimpl
def deltamux_weights(config: FullConfig, base: BaseModel) -> dict[str, str]:
    return {change.name: change.name for change in _changes(config, base)}


@hookimpl
def deltamux_schedule(config: FullConfig, base: BaseModel, num_steps: int) -> TrainingSchedule | None:
    if not config.unfreeze:
        return None
    layers = range(base.dims.num_layers)
    groups = [layers[max(0, i - config.layers_per_stage) : i] for i in range(len(layers), 0, -config.layers_per_stage)]
    above = outer_changes(base, embedding=False, final_norm=True, head=config.train_head)
    stages = [above, *(layer_changes(base, group) for group in groups)]
    stages[-1] += outer_changes(base, embedding=config.train_embedding, final_norm=False, head=False)
    return Unfreezing([{change.name for change in stage} for stage in stages], num_steps)


class Unfreezing(TrainingSchedule):
    """Gradual unfreezing: one stage after the other, at equal distances; what is unfrozen stays so.

    Args:
        stages: names of the parameters that each stage unfreezes.
    """

    def __init__(self, stages: list[set[str]], num_steps: int) -> None:
        super().__init__()
        self._stages = stages
        self._num_steps = num_steps

    def frozen(self, step: int) -> Collection[str]:
        unfrozen = min(len(self._stages), 1 + step * len(self._stages) // max(1, self._num_steps))
        return set().union(*self._stages[unfrozen:])


@hookimpl
def deltamux_config(config: FullConfig, base: BaseModel) -> dict[str, Any]:
    return {**asdict(config), "task_type": "CAUSAL_LM"}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: FullConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    return dense_program(base, _changes(config, base), tensors)


def _changes(config: FullConfig, base: BaseModel) -> list[Change]:
    outer = outer_changes(base, embedding=config.train_embedding, final_norm=True, head=config.train_head)
    return [*outer, *layer_changes(base, range(base.dims.num_layers))]


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="full",
        title="Full fine-tuning",
        summary="every weight; on demand layer by layer from the top (unfreeze=true)",
        paper="https://arxiv.org/abs/1801.06146",
        peft_type="DELTAMUX_FULL",
        config_class=FullConfig,
        merges=True,
        in_peft=False,
        learning_rate=2e-5,
        learning_rate_source="Llama 2 (arXiv:2307.09288), section 3.1: 2e-5; ten times below LoRA's",
        learning_rate_width=4096,
    )
