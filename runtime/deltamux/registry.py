"""The methods that are installed: a typed facade in front of pluggy, so that nobody else calls a hook.

`Registry.get` returns a `Method` whose calls reach exactly one plugin, check what it returned, and turn what it raises
into an error that names the plugin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from deltamux import hookspecs
from deltamux.configs import build_config
from deltamux.errors import DeltamuxError, InvalidAdapterError, PluginError, UnknownMethodError
from deltamux.hookspecs import ENTRY_POINT_GROUP, PROJECT, MethodInfo, ParameterSpec, TrainingSchedule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltamux.deltas import BaseModel, Checkpoint, Program

T = TypeVar("T")
REQUIRED_HOOKS = ("deltamux_method", "deltamux_parameters", "deltamux_program")


def create_plugin_manager(*, load_installed: bool = True) -> pluggy.PluginManager:
    """Returns a plugin manager that knows deltamux's hooks, with the installed plugins unless told otherwise.

    A plugin that fails to import is left out and kept in ``Registry.broken``; it stops nobody else's methods.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    if load_installed:
        _load_installed(manager)
    return manager


@dataclass(frozen=True)
class Method:
    """One fine-tuning method. Every call reaches its plugin alone.

    Attributes:
        plugin: the name that its plugin is registered under.
    """

    info: MethodInfo
    plugin: str
    _call: Callable[[str, Mapping[str, Any]], Any] = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        return self.info.name

    def parse(self, values: Mapping[str, Any]) -> Any:
        """Returns the method's config from the values of adapter_config.json, a YAML file or ``--set``.

        Null stands for a field's default.

        Raises:
            InvalidConfigError: unknown keys (all of them named), a value of another type, or out of range.
        """
        ignored = self.info.ignored_keys | {"peft_type"}
        return build_config(self.info.config_class, values, ignored=ignored, method=self.name)

    def parameters(self, config: Any, base: BaseModel) -> dict[str, ParameterSpec]:
        """Returns the trainable parameters' declarations by name."""
        return dict(self._checked("deltamux_parameters", Mapping, config=config, base=base))

    def export(self, config: Any, base: BaseModel, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the checkpoint's tensors for the given parameters; differentiable."""
        exported = self._call("deltamux_export", {"config": config, "base": base, "parameters": parameters})
        return parameters if exported is None else exported

    def prepare(self, config: Any, base: BaseModel, model: nn.Module) -> bool:
        """Changes the loaded base in place before training; tells whether the method did so."""
        return bool(self._call("deltamux_prepare", {"config": config, "base": base, "model": model}))

    def schedule(self, config: Any, base: BaseModel, num_steps: int) -> TrainingSchedule:
        """Returns what happens beside gradient steps in a training run of `num_steps` updates."""
        arguments = {"config": config, "base": base, "num_steps": num_steps}
        schedule = self._call("deltamux_schedule", arguments)
        if schedule is None:
            return TrainingSchedule()
        if not isinstance(schedule, TrainingSchedule):
            raise self._rubbish("deltamux_schedule", schedule, TrainingSchedule)
        return schedule

    def program(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
        """Returns the program of a checkpoint's tensors, every op checked against its site; differentiable.

        Raises:
            InvalidAdapterError: a tensor is missing, or not part of the method (unclaimed).
            BaseMismatchError: a site is missing or a shape does not fit the base.
        """
        from deltamux.deltas import ClaimedTensors, Program

        claimed = ClaimedTensors(tensors)
        program: Program = self._checked("deltamux_program", Program, config=config, base=base, tensors=claimed)
        program.placed(base)
        claimed.check_all_claimed(self.name)
        return program

    def merge(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the base parameters that the adapter changes, merged, by name and in the base's dtype.

        Raises:
            NotMergeableError: with the reason.
        """
        from deltamux.deltas import merge_program

        program = self.program(config, base, tensors)
        merged = self._call("deltamux_merge", {"config": config, "base": base, "tensors": tensors})
        return merge_program(program, base) if merged is None else dict(merged)

    def checkpoint(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """Returns the files' content for trained tensors; PEFT loads it where PEFT has the method."""
        from deltamux.deltas import Checkpoint

        values = self._call("deltamux_config", {"config": config, "base": base})
        values = values if values is not None else dataclasses.asdict(config)
        metadata = {"base_fingerprint": base.fingerprint} if base.fingerprint else {}
        return Checkpoint({**values, "peft_type": self.info.peft_type}, tensors, metadata)

    def _checked(self, hook: str, expected: Any, **arguments: Any) -> Any:
        result = self._call(hook, arguments)
        if not isinstance(result, expected):
            raise self._rubbish(hook, result, expected)
        return result

    def _rubbish(self, hook: str, result: object, expected: type[Any]) -> PluginError:
        return PluginError(
            f"plugin {self.name!r}: {hook} returned {type(result).__name__}, but must return {expected.__name__}",
            metadata={"plugin": self.name, "hook": hook},
        )


class Registry:
    """All methods of a plugin manager, by name.

    Attributes:
        broken: entry points that could not be used, with the reason; they stop nobody else's methods.
    """

    def __init__(self, manager: pluggy.PluginManager | None = None) -> None:
        self._manager = manager or create_plugin_manager()
        self.broken: dict[str, str] = dict(getattr(self._manager, "broken", {}))
        self._methods: dict[str, Method] = {}
        self._check_hooks()
        for plugin in sorted(self._manager.get_plugins(), key=self._label):
            self._admit(plugin)

    def names(self) -> list[str]:
        return sorted(self._methods)

    def methods(self) -> list[Method]:
        return [self._methods[name] for name in self.names()]

    def get(self, name: str) -> Method:
        """Returns the method of that name; raises UnknownMethodError that lists the known ones."""
        try:
            return self._methods[name]
        except KeyError:
            raise self._unknown(f"unknown method {name!r}") from None

    def recognise(self, checkpoint: Checkpoint) -> tuple[Method, Checkpoint]:
        """Finds the method that a checkpoint was made by, and returns the checkpoint in that method's own names.

        Raises:
            UnknownMethodError: no installed plugin provides its ``peft_type``.
            InvalidAdapterError: the config has no ``peft_type``, and no plugin knows the tensors' names.
        """
        peft_type = checkpoint.config.get("peft_type")
        for method in self.methods():
            if peft_type is not None and method.info.peft_type == peft_type and not method.info.files_of:
                return method, checkpoint
        for method in self.methods():
            own = method._call("deltamux_recognise", {"checkpoint": checkpoint})
            if own is not None:
                return method, own
        if peft_type is None:
            raise InvalidAdapterError(
                "adapter_config.json has no peft_type, and no installed method knows the tensors' names",
                metadata={"field": "peft_type"},
            )
        raise self._unknown(f"no installed method provides peft_type {peft_type!r}")

    def _unknown(self, problem: str) -> UnknownMethodError:
        known = ", ".join(f"{m.name} ({m.info.peft_type})" for m in self.methods()) or "none"
        return UnknownMethodError(
            f"{problem}; installed: {known}. Other methods come as plugins", metadata={"known": known}
        )

    def _label(self, plugin: object) -> str:
        return self._manager.get_name(plugin) or repr(plugin)

    def _check_hooks(self) -> None:
        """Leaves out plugins whose hooks the specification does not know (a misspelt name is silent otherwise)."""
        for plugin in list(self._manager.get_plugins()):
            known = {name for name in dir(hookspecs) if name.startswith("deltamux_")}
            offered = {name for name in dir(plugin) if self._manager.parse_hookimpl_opts(plugin, name) is not None}
            misspelt, missing = sorted(offered - known), sorted(set(REQUIRED_HOOKS) - offered)
            if misspelt or missing:
                problem = f"unknown hook {', '.join(misspelt)}" if misspelt else f"missing hook {', '.join(missing)}"
                self.broken[self._label(plugin)] = problem
                self._manager.unregister(plugin)
        self._manager.check_pending()

    def _admit(self, plugin: object) -> None:
        label = self._label(plugin)
        call = _caller(self._manager, plugin, label)
        try:
            info = call("deltamux_method", {})
        except DeltamuxError as error:
            self.broken[label] = error.message
            return
        if not isinstance(info, MethodInfo):
            self.broken[label] = f"deltamux_method returned {type(info).__name__}, but must return MethodInfo"
        elif info.name in self._methods:
            self.broken[label] = f"method {info.name!r} is already provided by another plugin"
        else:
            self._methods[info.name] = Method(info, label, call)


def _caller(manager: pluggy.PluginManager, plugin: object, label: str) -> Callable[[str, Mapping[str, Any]], Any]:
    """Returns a function that calls one hook of one plugin; whatever is not ours becomes a PluginError."""
    others = [p for p in manager.get_plugins() if p is not plugin]

    def call(hook: str, arguments: Mapping[str, Any]) -> Any:
        try:
            results = manager.subset_hook_caller(hook, others)(**arguments)
        except DeltamuxError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {label!r} failed in {hook}: {type(error).__name__}: {error}",
                metadata={"plugin": label, "hook": hook},
            ) from error
        return results[0] if results else None

    return call


def _load_installed(manager: pluggy.PluginManager) -> None:
    from importlib.metadata import entry_points

    broken: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            manager.register(point.load(), name=point.name)
        except Exception as error:
            broken[point.name] = f"{type(error).__name__}: {error}"
    manager.broken = broken  # type: ignore[attr-defined]  # read once, by Registry
