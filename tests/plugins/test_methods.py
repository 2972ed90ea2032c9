"""The conformance suite over all registered methods, and what a broken plugin cannot do."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from deltamux.conformance import CHECKS, Case, cases
from deltamux.deltas import BaseModel, Bias, Checkpoint, Program
from deltamux.deltas.composition import Component, CompositionMode, compose
from deltamux.errors import PluginError, UnknownMethodError
from deltamux.hookspecs import MethodInfo, hookimpl
from deltamux.registry import Registry, create_plugin_manager
from deltamux_testing import third_party

METHODS = Registry().names()


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=[] if c.architecture == "llama" else pytest.mark.slow) for c in cases()]
)
def test_every_method_passes_every_check(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


def info(name: str) -> MethodInfo:
    return MethodInfo(name, name, "", "", name.upper(), dict, False, False, 1e-3, "")


def registry_with(**plugins: Any) -> Registry:
    manager = create_plugin_manager()
    for name, hooks in plugins.items():
        plugin = ModuleType(name)
        for hook, function in hooks.items():
            setattr(plugin, hook, hookimpl(function))
        manager.register(plugin, name=name)
    return Registry(manager)


@dataclass(frozen=True)
class Empty:
    """A config without options."""


GOOD: dict[str, Any] = {
    "deltamux_method": lambda: info("good"),
    "deltamux_parameters": lambda config, base: {},
    "deltamux_program": lambda config, base, tensors: Program.of(
        [(base.linears[0].name, Bias(torch.zeros(base.linears[0].out_features)))]
    ),
}


@pytest.mark.parametrize(
    ("hooks", "problem"),
    [
        ({**GOOD, "deltamux_programme": lambda config: None}, "unknown hook deltamux_programme"),
        ({"deltamux_method": lambda: info("bad")}, "missing hook deltamux_parameters, deltamux_program"),
        ({**GOOD, "deltamux_method": lambda: "lora"}, "returned str"),
        ({**GOOD, "deltamux_method": lambda: info("lora")}, "already provided"),
        ({**GOOD, "deltamux_method": lambda: 1 / 0}, "ZeroDivisionError"),
        ({**GOOD, "deltamux_method": lambda: sys.exit(0)}, "SystemExit"),
        (
            {**GOOD, "deltamux_method": lambda: replace(info("new"), peft_type="LORA")},
            "already belong to method 'lora'",
        ),
        ({**GOOD, "deltamux_method": lambda: replace(info("new"), name="")}, "are words"),
    ],
)
def test_a_broken_plugin_is_left_out_by_name_and_the_others_work(hooks: dict[str, Any], problem: str) -> None:
    registry = registry_with(zzz_broken=hooks, good=GOOD)
    assert problem in registry.broken["zzz_broken"]
    assert registry.names() == sorted(["good", *METHODS])


@pytest.mark.parametrize(
    ("entry", "name", "peft_type", "label"),
    [
        ("aaa", "lora", "MINE", "aaa"),
        ("aaa", "mine", "LORA", "aaa"),
        ("lora", "lora", "LORA", "lora (taker_lora)"),
    ],
)
def test_a_plugin_of_another_distribution_never_takes_what_is_built_in(
    entry: str, name: str, peft_type: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = {entry: third_party.method(name, peft_type=peft_type)}
    monkeypatch.syspath_prepend(third_party.install(tmp_path, plugins, distribution="taker"))
    registry = Registry()
    assert registry.names() == METHODS
    assert "already" in registry.broken[label]
    assert registry.get("lora").info.title == "LoRA"
    assert registry.recognise(Checkpoint({"peft_type": "LORA"}, {}))[0] is registry.get("lora")


@pytest.mark.parametrize(
    ("source", "value", "problem"),
    [
        ("import sys; sys.exit(3)", "", "SystemExit: 3"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "", "Odd: odd"),
        ("things = []", ":things", "TypeError: unhashable"),
        ("nothing = None", ":nothing", "None, not a module"),
        (
            "from deltamux.hookspecs import hookimpl\n@hookimpl\ndef deltamux_program(config, model): pass",
            "",
            "PluginValidationError",
        ),
    ],
)
def test_whatever_a_plugin_is_the_others_are_there(
    source: str, value: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module of its own a case: an import is remembered by name.
    case = f"case{zlib.crc32(source.encode())}"
    monkeypatch.syspath_prepend(third_party.install(tmp_path, {"odd": source}, distribution=case, value=value))
    registry = Registry()
    assert problem in registry.broken["odd"]
    assert registry.names() == METHODS


AS_OBJECT = """
from deltamux import hookimpl
from deltamux.deltas import Bias, Program
from deltamux.hookspecs import MethodInfo


class Shifted:
    def __init__(self, name):
        self.name = name

    @hookimpl
    def deltamux_method(self):
        return MethodInfo(self.name, self.name, "", "", self.name.upper(), dict, False, False, 1e-3, "")

    @hookimpl
    def deltamux_parameters(self, config, base):
        return {}

    @hookimpl
    def deltamux_program(self, config, base, tensors):
        return Program.of([(base.linears[0].name, Bias(tensors[self.name]))])


METHOD = Shifted("shifted")
"""


@pytest.mark.parametrize("value", ["", ":METHOD"], ids=["module", "instance"])
def test_a_method_may_be_an_instance_of_a_class(
    value: str, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution = f"shifts{len(value)}"
    monkeypatch.syspath_prepend(third_party.install(tmp_path, {"x": AS_OBJECT}, distribution=distribution, value=value))
    registry = Registry()
    assert registry.broken == {}
    bias = torch.ones(base.linears[0].out_features)
    ((_, op),) = registry.get("shifted").program({}, base, {"shifted": bias})
    assert isinstance(op, Bias)


def test_a_composition_uses_the_methods_of_its_own_registry(base: BaseModel) -> None:
    adapter = Checkpoint({"peft_type": "GOOD"}, {})
    composed = compose([Component("a", adapter), Component("b", adapter)], CompositionMode.STACK)
    info_of_a_dataclass = {"deltamux_method": lambda: replace(info("good"), config_class=Empty)}
    assert len(registry_with(good={**GOOD, **info_of_a_dataclass}).load(composed, base).program.placements) == 2
    with pytest.raises(UnknownMethodError, match="GOOD"):
        Registry().load(composed, base)


def test_what_is_skipped_is_not_imported_and_every_phase_is_observed_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(third_party.install(tmp_path, {"hangs": "raise AssertionError('imported')"}))
    phases: list[tuple[str, str]] = []

    def on_phase(plugin: str, phase: str) -> None:
        phases.append((plugin, phase))

    registry = Registry(create_plugin_manager(skip={"hangs": "it hangs"}, on_phase=on_phase))
    assert registry.broken == {"hangs": "it hangs"}
    assert "hangs" not in {plugin for plugin, _ in phases}
    assert [phase for plugin, phase in phases if plugin == "lora"] == [
        "its import",
        "the check of its hooks",
        "deltamux_method",
    ]


def test_a_plugin_that_fails_to_recognise_a_checkpoint_hides_it_from_no_other() -> None:
    checkpoint = Checkpoint({"peft_type": "FOREIGN"}, {})
    failing = {**GOOD, "deltamux_method": lambda: info("aaa"), "deltamux_recognise": lambda checkpoint: 42}
    knowing = {**GOOD, "deltamux_recognise": lambda checkpoint: checkpoint}
    assert registry_with(aaa=failing, good=knowing).recognise(checkpoint)[0].name == "good"
    with pytest.raises(PluginError, match="'aaa': deltamux_recognise returned int"):
        registry_with(aaa=failing).recognise(checkpoint)


def test_a_plugin_that_returns_another_type_is_refused_by_name(base: BaseModel) -> None:
    registry = registry_with(good={**GOOD, "deltamux_program": lambda config, base, tensors: 42})
    with pytest.raises(PluginError, match="'good': deltamux_program returned int"):
        registry.get("good").program({}, base, {})


def test_a_plugin_that_raises_is_named(base: BaseModel) -> None:
    registry = registry_with(good={**GOOD, "deltamux_parameters": lambda config, base: [][0]})
    with pytest.raises(PluginError, match="'good' failed in deltamux_parameters: IndexError"):
        registry.get("good").parameters({}, base)


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownMethodError, match=r"houlsby \(DELTAMUX_HOULSBY\), .*ia3 \(IA3\), .*lora \(LORA\)"):
        Registry().get("lorra")
