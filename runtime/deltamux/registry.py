"""The registry of the methods that are installed, and of the adapters that they read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamux.errors import DeltamuxError, UnknownMethodError
from deltamux.hookspecs import MethodInfo
from deltamux.method import LoadedAdapter as LoadedAdapter
from deltamux.method import Method as Method
from deltamux.plugin_manager import PluginManager
from deltamux.plugin_manager import create_plugin_manager as create_plugin_manager

if TYPE_CHECKING:
    from deltamux.deltas import BaseModel, Checkpoint


class Registry:
    """All methods of a plugin manager, by name.

    The methods of the distribution ``deltamux`` come first: no other can take their names or checkpoints.

    Args:
        manager: of the plugins; None for one with all that are installed.

    Attributes:
        broken: plugins that cannot be used, by label, with the reason.
    """

    def __init__(self, manager: PluginManager | None = None) -> None:
        self._manager = manager or create_plugin_manager()
        self._methods: dict[str, Method] = {}
        self._manager.check_hooks()
        self.broken = dict(self._manager.broken)
        for label in self._manager.labels():
            self._admit(label)

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

    def load(self, source: Checkpoint | str | Path, base: BaseModel) -> LoadedAdapter:
        """Returns the adapter of a checkpoint, or of a directory with its files, checked against a base.

        Raises:
            InvalidAdapterError, UnknownMethodError: the files are not an adapter, or not one of an installed method.
            InvalidConfigError, BaseMismatchError: see `Method.load`.
        """
        from deltamux.deltas import Checkpoint

        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.read(source)
        method, own = self.recognise(checkpoint)
        return method.load(own, base)

    def recognise(self, checkpoint: Checkpoint) -> tuple[Method, Checkpoint]:
        """Returns the method that a checkpoint was made by, and the checkpoint in that method's own names.

        Raises:
            UnknownMethodError: no installed plugin provides its ``peft_type``.
            InvalidAdapterError: the config has no ``peft_type``, and no plugin recognises the tensors' names.
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

    def _admit(self, label: str) -> None:
        call = self._manager.caller(label)
        try:
            info = call("deltamux_method", {})
        except DeltamuxError as error:
            self.broken[label] = error.message
            return
        if problem := self._problem(info):
            self.broken[label] = problem
        else:
            self._methods[info.name] = Method(info, label, self, call, self._manager.on_phase)

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
