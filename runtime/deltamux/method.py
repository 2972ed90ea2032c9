"""`Method`: one fine-tuning method, as typed calls of its plugin's hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from deltamux.configs import build_config
from deltamux.errors import BaseMismatchError, DeltamuxError, PluginError
from deltamux.hookspecs import BOOKKEEPING, MethodInfo, ParameterSpec, TrainingSchedule
from deltamux.plugin_manager import PLUGIN_ERRORS, HookCaller, PhaseObserver, plugin_error

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltamux.deltas import BaseModel, Checkpoint, Program
    from deltamux.registry import Registry


class LoadedAdapter(NamedTuple):
    """An adapter of files: its method, config and program, and the files' content in the method's own names."""

    method: Method
    config: Any
    program: Program
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Method:
    """One fine-tuning method. Every call reaches its plugin alone, and its result is checked.

    Attributes:
        plugin: the label of its plugin.
    """

    info: MethodInfo
    plugin: str
    _registry: Registry = dataclasses.field(repr=False)
    _call: HookCaller = dataclasses.field(repr=False)
    _on_phase: PhaseObserver = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        return self.info.name

    def parse(self, values: Mapping[str, Any]) -> Any:
        """Returns the method's config from the values of adapter_config.json, a YAML file or ``--set``.

        Null is a value only of fields with None in their type.

        Raises:
            InvalidConfigError: unknown keys (all of them named), a value of another type, or out of range.
        """
        self._on_phase(self.name, "its config class")
        info, needed = self.info, self.info.file_defaults
        ignored = info.ignored_keys | BOOKKEEPING | {"peft_type"}
        try:
            return build_config(
                info.config_class, values, method=info.name, ignored=ignored, refused=info.refused_keys, needed=needed
            )
        except DeltamuxError:
            raise
        except PLUGIN_ERRORS as error:
            raise plugin_error(self.name, "its config class", error) from error

    def parameters(self, config: Any, base: BaseModel) -> dict[str, ParameterSpec]:
        """Returns the trainable parameters' declarations by name."""
        return dict(self._checked("deltamux_parameters", Mapping, config=config, base=base))

    def export(self, config: Any, base: BaseModel, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the checkpoint's tensors for the given parameters; differentiable."""
        exported = self._call("deltamux_export", {"config": config, "base": base, "parameters": parameters})
        return parameters if exported is None else exported

    def prepare(self, config: Any, base: BaseModel, model: nn.Module) -> bool:
        """Changes the loaded base in place before training; returns whether the method did so."""
        return bool(self._call("deltamux_prepare", {"config": config, "base": base, "model": model}))

    def weights(self, config: Any, base: BaseModel) -> dict[str, str]:
        """Returns the base parameter that each trainable parameter is the change of; empty where they are none."""
        named = self._call("deltamux_weights", {"config": config, "base": base})
        return {} if named is None else dict(self._expected("deltamux_weights", Mapping, named))

    def schedule(self, config: Any, base: BaseModel, num_steps: int) -> TrainingSchedule:
        """Returns the schedule of a training run of `num_steps` updates."""
        schedule = self._call("deltamux_schedule", {"config": config, "base": base, "num_steps": num_steps})
        if schedule is None:
            return TrainingSchedule()
        checked: TrainingSchedule = self._expected("deltamux_schedule", TrainingSchedule, schedule)
        return checked

    def load(self, checkpoint: Checkpoint, base: BaseModel, *, check_values: bool = True) -> LoadedAdapter:
        """Returns a checkpoint in the method's own names with its config and program, all of it checked.

        Args:
            check_values: whether the program's values, too, are checked for being finite.
        Raises:
            InvalidConfigError, InvalidAdapterError: the files are wrong, or hold a value that is not finite.
            BaseMismatchError: they are of another base, by its fingerprint or by a shape.
        """
        from deltamux.deltas.checkpoint import check_finite

        config = self.parse(checkpoint.config)
        _check_base(checkpoint, base)
        check_finite(checkpoint.tensors)
        program = self.program(config, base, checkpoint.tensors)
        self._on_phase(self.name, "the check of its program")
        if check_values:
            program.check_finite()
        return LoadedAdapter(self, config, program, checkpoint)

    def program(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
        """Returns the program of a checkpoint's tensors, every op checked against its site; differentiable.

        Raises:
            InvalidAdapterError: a tensor is missing, or among the leftovers.
            BaseMismatchError: a site is missing or a shape does not fit the base.
        """
        from deltamux.deltas.checkpoint import TrackedTensors
        from deltamux.deltas.leftovers import changed_leftovers, explained, leftovers_error

        tracked = TrackedTensors(tensors)
        try:
            program = self._placed(config, base, tracked)
            leftovers = changed_leftovers(tracked.leftovers(), tensors, base)
            if leftovers:
                raise leftovers_error(leftovers, self.name, tensors, base)
        except DeltamuxError as error:
            if not self.info.in_peft:
                raise
            raise explained(error, tensors, base) from error.__cause__  # it may be the same error
        return program

    def _placed(self, config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
        """Returns the plugin's program, every op checked against its site."""
        from deltamux.deltas import Program

        program: Program = self._checked(
            "deltamux_program", Program, config=config, base=base, tensors=tensors, registry=self._registry
        )
        try:
            program.placed(base)
        except DeltamuxError:
            raise
        except PLUGIN_ERRORS as error:
            raise plugin_error(self.name, "the check of its program", error) from error
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
        """Returns what the method's merge hook computes; None where it has none, and its ops are merged one by one.

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

    def _checked(self, hook: str, expected: type[Any], **arguments: Any) -> Any:
        return self._expected(hook, expected, self._call(hook, arguments))

    def _expected(self, hook: str, expected: type[Any], result: Any) -> Any:
        """Returns a hook's result; raises PluginError where it is of another type than the hook's."""
        if not isinstance(result, expected):
            raise PluginError(
                f"plugin {self.name!r}: {hook} returned {type(result).__name__}, but must return {expected.__name__}",
                metadata={"plugin": self.name, "hook": hook},
            )
        return result


def _check_base(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Raises BaseMismatchError where an adapter names another base as the one that it was trained on."""
    declared = checkpoint.metadata.get("base_fingerprint")
    if declared and base.fingerprint and declared != base.fingerprint:
        raise BaseMismatchError(
            f"the adapter was trained on a base with fingerprint {declared}; this base has {base.fingerprint}: train it"
            " on this base, or use it with its own",
            metadata={"declared": declared, "base": base.fingerprint},
        )
