"""The methods that are installed: a typed facade in front of pluggy, so that nobody else calls a hook.

`Registry.get` returns a `Method` whose calls reach exactly one plugin, check what it returned, and turn what it raises
into an error that names the plugin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pluggy

from deltamux import hookspecs
from deltamux.configs import build_config
from deltamux.errors import DeltamuxError, PluginError, UnknownMethodError
from deltamux.hookspecs import ENTRY_POINT_GROUP, PROJECT, MethodInfo, ParameterSpec, TrainingSchedule

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import Tensor, nn

    from deltamux.deltas import BaseModel, Checkpoint, Program

Announce = Callable[[str, str], None]
"""Told a plugin's label and what of it is about to run; a process that watches knows whom to blame for a hang."""

REQUIRED_HOOKS = ("deltamux_method", "deltamux_parameters", "deltamux_program")


def _silent(plugin: str, step: str) -> None:
    pass


def create_plugin_manager(
    *, load_installed: bool = True, skip: Mapping[str, str] = MappingProxyType({}), announce: Announce = _silent
) -> pluggy.PluginManager:
    """Returns a plugin manager that knows deltamux's hooks, with the installed plugins unless told otherwise.

    A plugin that fails to import is left out and kept in ``Registry.broken``; it stops nobody else's methods.

    Args:
        skip: labels of plugins that are not imported, with the reason.
        announce: called before each import.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    if load_installed:
        _load_installed(manager, skip, announce)
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
    _announce: Announce = dataclasses.field(default=_silent, repr=False)

    @property
    def name(self) -> str:
        return self.info.name

    def parse(self, values: Mapping[str, Any]) -> Any:
        """Returns the method's config from the values of adapter_config.json, a YAML file or ``--set``.

        Null is a value of those fields alone whose type has None.

        Raises:
            InvalidConfigError: unknown keys (all of them named), a value of another type, or out of range.
        """
        self._announce(self.name, "its config class")
        info, needed = self.info, self.info.file_defaults
        ignored = info.ignored_keys | {"peft_type", "base_model_name_or_path"}
        try:
            return build_config(
                info.config_class, values, method=info.name, ignored=ignored, refused=info.refused_keys, needed=needed
            )
        except DeltamuxError:
            raise
        except _ANYTHING as error:
            raise _failed(self.name, "its config class", error) from error

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

    def weights(self, config: Any, base: BaseModel) -> dict[str, str]:
        """Returns, by parameter, the base parameters that a method's are changes of; none where it does not say so."""
        named = self._call("deltamux_weights", {"config": config, "base": base})
        return {} if named is None else dict(self._expected("deltamux_weights", Mapping, named))

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
        from deltamux.deltas import ClaimedTensors
        from deltamux.deltas.leftovers import changed_leftovers, explained, unclaimed

        claimed = ClaimedTensors(tensors)
        try:
            program = self._placed(config, base, claimed)
            leftovers = changed_leftovers(claimed.leftovers(), tensors, base)
            if leftovers:
                raise unclaimed(leftovers, self.name, tensors, base)
        except DeltamuxError as error:
            if not self.info.in_peft:
                raise
            raise explained(error, tensors, base) from error.__cause__  # it may be the same error
        return program

    def _placed(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
        """Returns the plugin's program, every op checked against its site."""
        from deltamux.deltas import Program

        program: Program = self._checked("deltamux_program", Program, config=config, base=base, tensors=tensors)
        try:
            program.placed(base)
        except DeltamuxError:
            raise
        except _ANYTHING as error:
            raise _failed(self.name, "the check of its program", error) from error
        return program

    def merge(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the base parameters that the adapter changes, merged, by name and in the base's dtype.

        Raises:
            NotMergeableError: with the reason.
        """
        from deltamux.deltas import merge_program

        program = self.program(config, base, tensors)
        merged = self.own_merge(config, base, tensors)
        return merge_program(program, base) if merged is None else merged

    def own_merge(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Returns what the method's merge hook computes; None where it has none, and its ops are folded one by one.

        Raises:
            NotMergeableError: with the reason.
        """
        merged = self._call("deltamux_merge", {"config": config, "base": base, "tensors": tensors})
        return None if merged is None else dict(merged)

    def checkpoint(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """Returns the files' content for trained tensors; PEFT loads it where PEFT has the method."""
        from deltamux.deltas import Checkpoint

        values = self._call("deltamux_config", {"config": config, "base": base})
        values = values if values is not None else dataclasses.asdict(config)
        metadata = {"base_fingerprint": base.fingerprint} if base.fingerprint else {}
        values = {"base_model_name_or_path": base.name or None, **values, "peft_type": self.info.peft_type}
        return Checkpoint(values, tensors, metadata)

    def recognise(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Returns the checkpoint in the method's own names, or None if it is not the method's."""
        from deltamux.deltas import Checkpoint

        own = self._call("deltamux_recognise", {"checkpoint": checkpoint})
        return None if own is None else self._expected("deltamux_recognise", Checkpoint, own)

    def _checked(self, hook: str, expected: Any, **arguments: Any) -> Any:
        return self._expected(hook, expected, self._call(hook, arguments))

    def _expected(self, hook: str, expected: Any, result: Any) -> Any:
        if not isinstance(result, expected):
            raise self._rubbish(hook, result, expected)
        return result

    def _rubbish(self, hook: str, result: object, expected: type[Any]) -> PluginError:
        return PluginError(
            f"plugin {self.name!r}: {hook} returned {type(result).__name__}, but must return {expected.__name__}",
            metadata={"plugin": self.name, "hook": hook},
        )


_shared: list[Registry] = []


def shared_registry() -> Registry:
    """Returns the process's registry: the first that was made, or one made now.

    For methods that are made of other methods: they see the same plugins as whoever calls them.
    """
    return _shared[0] if _shared else Registry()


class Registry:
    """All methods of a plugin manager, by name.

    The methods of the distribution ``deltamux`` come first: no other can take their names or checkpoints.

    Args:
        announce: called before each hook.

    Attributes:
        broken: entry points that could not be used, with the reason; they stop nobody else's methods.
    """

    def __init__(self, manager: pluggy.PluginManager | None = None, *, announce: Announce = _silent) -> None:
        self._manager = manager or create_plugin_manager(announce=announce)
        self._announce = announce
        self.broken: dict[str, str] = dict(getattr(self._manager, "broken", {}))
        self._methods: dict[str, Method] = {}
        self._check_hooks()
        own: frozenset[str] = getattr(self._manager, "own", frozenset())
        for label in sorted(map(self._label, self._manager.get_plugins()), key=lambda label: (label not in own, label)):
            self._admit(label)
        if not _shared:
            _shared.append(self)

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
                config = {**method.info.file_defaults, **checkpoint.config}
                return method, dataclasses.replace(checkpoint, config=config)
        failed: DeltamuxError | None = None
        for method in self.methods():
            try:
                own = method.recognise(checkpoint)
            except DeltamuxError as error:  # the next method may be the right one
                failed = failed or error
                continue
            if own is not None:
                return method, own
        if failed:
            raise failed
        if peft_type is None:
            from deltamux.deltas.leftovers import without_type

            raise without_type(checkpoint.config)
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
        known = {name for name in dir(hookspecs) if name.startswith("deltamux_")}
        for plugin in list(self._manager.get_plugins()):
            label = self._label(plugin)
            self._announce(label, "the look at its hooks")
            offered = {name for name in dir(plugin) if self._manager.parse_hookimpl_opts(plugin, name) is not None}
            misspelt, missing = sorted(offered - known), sorted(set(REQUIRED_HOOKS) - offered)
            if misspelt or missing:
                problem = f"unknown hook {', '.join(misspelt)}" if misspelt else f"missing hook {', '.join(missing)}"
                self.broken[label] = problem
                self._manager.unregister(plugin)
        self._manager.check_pending()

    def _admit(self, label: str) -> None:
        call = _caller(self._manager, self._manager.get_plugin(label), label, self._announce)
        try:
            info = call("deltamux_method", {})
        except DeltamuxError as error:
            self.broken[label] = error.message
            return
        if problem := self._problem(info):
            self.broken[label] = problem
        else:
            self._methods[info.name] = Method(info, label, call, self._announce)

    def _problem(self, info: Any) -> str | None:
        if not isinstance(info, MethodInfo):
            return f"deltamux_method returned {type(info).__name__}, but must return MethodInfo"
        if not all(isinstance(value, str) and value for value in (info.name, info.peft_type)):
            return f"a method's name and peft_type are words, not {info.name!r} and {info.peft_type!r}"
        if info.name in self._methods:
            return f"method {info.name!r} is already provided by another plugin"
        for other in self._methods.values():
            if other.info.peft_type == info.peft_type and other.name != info.files_of:
                return f"checkpoints of peft_type {info.peft_type!r} already belong to method {other.name!r}"
        return None


_ANYTHING = (Exception, SystemExit, GeneratorExit)
"""What a plugin may raise: all but the user's own interruption."""


def _failed(label: str, step: str, error: BaseException) -> PluginError:
    return PluginError(
        f"plugin {label!r} failed in {step}: {type(error).__name__}: {error}", metadata={"plugin": label, "hook": step}
    )


def _caller(
    manager: pluggy.PluginManager, plugin: object, label: str, announce: Announce
) -> Callable[[str, Mapping[str, Any]], Any]:
    """Returns a function that calls one hook of one plugin; whatever is not ours becomes a PluginError."""
    others = [p for p in manager.get_plugins() if p is not plugin]

    def call(hook: str, arguments: Mapping[str, Any]) -> Any:
        announce(label, hook)
        try:
            results = manager.subset_hook_caller(hook, others)(**arguments)
        except DeltamuxError:
            raise
        except _ANYTHING as error:
            raise _failed(label, hook, error) from error
        return results[0] if results else None

    return call


def _load_installed(manager: pluggy.PluginManager, skip: Mapping[str, str], announce: Announce) -> None:
    from importlib.metadata import entry_points

    broken: dict[str, str] = {}
    labels: set[str] = set()
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: not _is_own(point)):
        # A name that is taken is no way to hide, or to be taken for, the one that has it.
        label = point.name if point.name not in labels else f"{point.name} ({point.value})"
        labels.add(label)
        if label in skip:
            broken[label] = skip[label]
            continue
        announce(label, "its import")
        try:
            _register(manager, point.load(), label)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            broken[label] = f"{type(error).__name__}: {error}"
            if manager.has_plugin(label):
                manager.unregister(name=label)
    manager.broken = broken  # type: ignore[attr-defined]  # read once, by Registry
    manager.own = frozenset(p.name for p in entry_points(group=ENTRY_POINT_GROUP) if _is_own(p))  # type: ignore[attr-defined]  # as above


def _register(manager: pluggy.PluginManager, plugin: Any, label: str) -> None:
    hash(plugin)  # pluggy keeps plugins in sets; a TypeError here concerns this one alone
    if manager.register(plugin, name=label) is None:
        raise TypeError("the entry point is None, not a module or an object")


def _is_own(point: EntryPoint) -> bool:
    """Tells whether an entry point is of the distribution deltamux itself."""
    try:
        return point.dist is not None and point.dist.name.lower() == PROJECT
    except Exception:  # a distribution without readable metadata
        return False
