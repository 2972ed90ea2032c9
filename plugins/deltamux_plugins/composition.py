"""Compositions: a stack of adapters, or a weighted sum of them, under one name.

    stack: the parts' ops, one part after the other     (a tenant's adapter over a domain's, say)
    sum:   y += w_1 change_1(x) + w_2 change_2(x) + ...  (LoRAs, dense changes, biases and norms)

A sum of LoRAs is exact (PEFT's `add_weighted_adapter` with ``cat``): their ranks are concatenated. Made by ``deltamux
compose`` from directories, and by ``deltamux adapter compose`` from what a server holds. Served as the parts are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltamux.deltas import BaseModel, Checkpoint, Program
from deltamux.deltas.composition import MAX_COMPONENTS, PEFT_TYPE, ComponentTensors, CompositionMode, add_up
from deltamux.errors import DeltamuxError, InvalidConfigError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux.registry import Registry
from deltamux_plugins.configs import VersionedConfig, invalid


@dataclass(frozen=True)
class ComponentConfig:
    """One component: its name, its weight in a sum, and its own adapter_config.json."""

    config: Mapping[str, Any]
    weight: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class CompositionConfig(VersionedConfig):
    """The components of a composition.

    Attributes:
        mode: stack or sum.
        parts: in the order in which they apply.
    """

    mode: str = "stack"
    parts: tuple[ComponentConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in set(CompositionMode):
            raise invalid("mode", f"is stack or sum, not {self.mode!r}")
        if len(self.parts) > MAX_COMPONENTS:
            raise InvalidConfigError(f"a composition has at most {MAX_COMPONENTS} parts", metadata={"field": "parts"})


@hookimpl
def deltamux_parameters(config: CompositionConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    raise InvalidConfigError("a composition is not trained: train its parts, and compose them")


@hookimpl
def deltamux_program(
    config: CompositionConfig, base: BaseModel, tensors: Mapping[str, Tensor], registry: Registry
) -> Program:
    programs = [_program(registry, index, part, base, tensors) for index, part in enumerate(config.parts)]
    return add_up(programs, [part.weight for part in config.parts], CompositionMode(config.mode))


def _program(
    registry: Registry, index: int, part: ComponentConfig, base: BaseModel, tensors: Mapping[str, Tensor]
) -> Program:
    try:
        checkpoint = Checkpoint(part.config, ComponentTensors(index, tensors))
        method, own = registry.recognise(checkpoint)
        return method.program(method.parse(own.config), base, own.tensors)
    except DeltamuxError as error:
        error.message = f"part {index} ({part.name}): {error.message}"
        error.metadata.setdefault("part", str(index))
        raise


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="composition",
        title="Composition",
        summary="several adapters as one: a stack, or a weighted sum",
        paper="https://arxiv.org/abs/2307.13269",
        peft_type=PEFT_TYPE,
        config_class=CompositionConfig,
        merges=True,
        in_peft=False,
        trains=False,
        learning_rate=1e-3,
        learning_rate_source="trains nothing",
    )
