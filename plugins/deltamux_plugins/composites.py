"""`CompositeMethod`: a method made of other methods, its components (mam, unipelt)."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, Protocol

from torch import Tensor

from deltamux import hookimpl
from deltamux.deltas import BaseModel, Op, Program
from deltamux.deltas.composition import ComponentTensors
from deltamux.errors import NotMergeableError
from deltamux.hookspecs import MethodInfo, ParameterSpec


class Component(Protocol):
    """The required hooks of a method, a module's or an object's."""

    def deltamux_parameters(self, config: Any, base: BaseModel) -> Mapping[str, ParameterSpec]: ...
    def deltamux_program(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program: ...


class CompositeMethod:
    """A method that hands each hook on to its components.

    Its config has a field for the config of each. Their parameters and tensors keep their names, after the component's.

    Args:
        components: methods by name.
        not_merged: why it is not merged.
    """

    def __init__(self, info: MethodInfo, components: Mapping[str, Component], not_merged: str) -> None:
        self._info = info
        self._components = components
        self._not_merged = not_merged

    @hookimpl
    def deltamux_method(self) -> MethodInfo:
        return self._info

    @hookimpl
    def deltamux_parameters(self, config: Any, base: BaseModel) -> dict[str, ParameterSpec]:
        return {
            f"{name}.{parameter}": spec
            for name, component in self._components.items()
            for parameter, spec in component.deltamux_parameters(getattr(config, name), base).items()
        }

    @hookimpl
    def deltamux_export(self, config: Any, base: BaseModel, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        exported = dict(parameters)
        for name, component in self._reparameterised():
            own = ComponentTensors(name, parameters)
            tensors = component.deltamux_export(getattr(config, name), base, own)
            for parameter in own:
                del exported[f"{name}.{parameter}"]
            exported |= {f"{name}.{tensor}": value for tensor, value in tensors.items()}
        return exported

    @hookimpl
    def deltamux_config(self, config: Any, base: BaseModel) -> dict[str, Any]:
        values = asdict(config)
        for name, component in self._reparameterised():
            own = {field.name for field in fields(getattr(config, name))}
            described = component.deltamux_config(getattr(config, name), base)
            values[name] = {key: value for key, value in described.items() if key in own}
        return {**values, "task_type": "CAUSAL_LM"}

    def _reparameterised(self) -> Iterator[tuple[str, Any]]:
        """Yields the components whose files hold other tensors than are trained."""
        return ((name, each) for name, each in self._components.items() if hasattr(each, "deltamux_export"))

    @hookimpl
    def deltamux_merge(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise NotMergeableError(
            f"{self._info.title} cannot be merged: {self._not_merged}. Serve it as an adapter, or train LoRA instead"
        )

    @hookimpl
    def deltamux_program(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
        return Program.of(self.placements(config, base, tensors))

    def placements(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Op]]:
        """Yields the ops of all components with their sites' names."""
        for name, component in self._components.items():
            yield from component.deltamux_program(getattr(config, name), base, ComponentTensors(name, tensors))
