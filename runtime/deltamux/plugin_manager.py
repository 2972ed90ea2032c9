"""pluggy's plugin manager, with deltamux's hooks and the installed plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pluggy

from deltamux import hookspecs
from deltamux.errors import DeltamuxError, PluginError
from deltamux.hookspecs import ENTRY_POINT_GROUP, PROJECT

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

PhaseObserver = Callable[[str, str], None]
"""Called with a plugin's label and its next phase (an import, a check, a hook), so that a hang can be attributed."""

HookCaller = Callable[[str, Mapping[str, Any]], Any]
"""Calls one hook of one plugin, by name and arguments; None where the plugin does not implement it."""

REQUIRED_HOOKS = ("deltamux_method", "deltamux_parameters", "deltamux_program")

PLUGIN_ERRORS = (Exception, SystemExit, GeneratorExit)
"""What a plugin may raise: everything but the user's interruption."""


def ignore_phase(plugin: str, phase: str) -> None:
    """The observer that does nothing."""


def plugin_error(label: str, phase: str, error: BaseException) -> PluginError:
    return PluginError(
        f"plugin {label!r} failed in {phase}: {type(error).__name__}: {error}",
        metadata={"plugin": label, "hook": phase},
    )


class PluginManager(pluggy.PluginManager):
    """The plugins of fine-tuning methods, each a module or an object with hooks.

    Attributes:
        on_phase: called before each import, check and hook.
        broken: plugins that cannot be used, by label, with the reason.
        own: labels of deltamux's own plugins.
    """

    def __init__(self, on_phase: PhaseObserver = ignore_phase) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(hookspecs)
        self.on_phase = on_phase
        self.broken: dict[str, str] = {}
        self.own: set[str] = set()

    def labels(self) -> list[str]:
        """Returns the plugins' labels: deltamux's own first, each group sorted."""
        labels = [self.label(plugin) for plugin in self.get_plugins()]
        return sorted(labels, key=lambda label: (label not in self.own, label))

    def label(self, plugin: object) -> str:
        return self.get_name(plugin) or repr(plugin)

    def load_installed(self, skip: Mapping[str, str]) -> None:
        """Registers the plugins of all installed distributions; those that fail are `broken`."""
        from importlib.metadata import entry_points

        labels: set[str] = set()
        for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: not _is_own(point)):
            # A second entry point of a name gets another label, so that it neither hides nor passes for the first.
            label = point.name if point.name not in labels else f"{point.name} ({point.value})"
            labels.add(label)
            if _is_own(point):
                self.own.add(label)
            if label in skip:
                self.broken[label] = skip[label]
                continue
            self.on_phase(label, "its import")
            try:
                self._add(point.load(), label)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self.broken[label] = f"{type(error).__name__}: {error}"
                if self.has_plugin(label):
                    self.unregister(name=label)

    def _add(self, plugin: Any, label: str) -> None:
        if not hasattr(plugin, "deltamux_method"):
            plugin = getattr(plugin, "METHOD", plugin)  # a module that defines its hooks as those of an object
        hash(plugin)  # pluggy keeps plugins in sets
        if self.register(plugin, name=label) is None:
            raise TypeError("the entry point is None, not a module or an object")

    def check_hooks(self) -> None:
        """Unregisters plugins that lack a required hook, or have one that the specification lacks, as `broken`."""
        known = {name for name in dir(hookspecs) if name.startswith("deltamux_")}
        for plugin in list(self.get_plugins()):
            label = self.label(plugin)
            self.on_phase(label, "the check of its hooks")
            offered = {name for name in dir(plugin) if self.parse_hookimpl_opts(plugin, name) is not None}
            unknown, missing = sorted(offered - known), sorted(set(REQUIRED_HOOKS) - offered)
            if unknown or missing:
                problem = f"unknown hook {', '.join(unknown)}" if unknown else f"missing hook {', '.join(missing)}"
                self.broken[label] = problem
                self.unregister(plugin)
        self.check_pending()

    def caller(self, label: str) -> HookCaller:
        """Returns a function that calls the hooks of one plugin; what it raises becomes a PluginError."""
        plugin = self.get_plugin(label)
        others = [other for other in self.get_plugins() if other is not plugin]

        def call(hook: str, arguments: Mapping[str, Any]) -> Any:
            self.on_phase(label, hook)
            try:
                results = self.subset_hook_caller(hook, others)(**arguments)
            except DeltamuxError:
                raise
            except PLUGIN_ERRORS as error:
                raise plugin_error(label, hook, error) from error
            return results[0] if results else None

        return call


def create_plugin_manager(
    *,
    load_installed: bool = True,
    skip: Mapping[str, str] = MappingProxyType({}),
    on_phase: PhaseObserver = ignore_phase,
) -> PluginManager:
    """Returns a plugin manager, with the installed plugins unless `load_installed` is false.

    Args:
        skip: labels of plugins that are not imported, with the reason.
        on_phase: called before each import, check and hook.
    """
    manager = PluginManager(on_phase)
    if load_installed:
        manager.load_installed(skip)
    return manager


def _is_own(point: EntryPoint) -> bool:
    """Returns whether an entry point belongs to the distribution deltamux."""
    try:
        return point.dist is not None and point.dist.name.lower() == PROJECT
    except Exception:  # a distribution without readable metadata
        return False
