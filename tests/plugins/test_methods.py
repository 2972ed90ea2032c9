"""What every method promises, held over all registered ones; and what a broken plugin cannot do."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from deltamux.conformance import CHECKS, Case, cases
from deltamux.conformance.cases import base_directory
from deltamux.deltas import BaseModel, Bias, Program
from deltamux.errors import PluginError, UnknownMethodError
from deltamux.hookspecs import MethodInfo, hookimpl
from deltamux.registry import Registry, create_plugin_manager

METHODS = Registry().names()


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_method_keeps_every_promise(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pretrained(base_directory("llama"))


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
    ],
)
def test_a_broken_plugin_is_left_out_by_name_and_the_others_work(hooks: dict[str, Any], problem: str) -> None:
    registry = registry_with(zzz_broken=hooks, good=GOOD)
    assert problem in registry.broken["zzz_broken"]
    assert registry.names() == sorted(["good", *METHODS])


def test_a_plugin_that_returns_rubbish_is_refused_by_name(base: BaseModel) -> None:
    registry = registry_with(good={**GOOD, "deltamux_program": lambda config, base, tensors: 42})
    with pytest.raises(PluginError, match="'good': deltamux_program returned int"):
        registry.get("good").program({}, base, {})


def test_a_plugin_that_raises_is_named(base: BaseModel) -> None:
    registry = registry_with(good={**GOOD, "deltamux_parameters": lambda config, base: [][0]})
    with pytest.raises(PluginError, match="'good' failed in deltamux_parameters: IndexError"):
        registry.get("good").parameters({}, base)


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownMethodError, match=r"houlsby \(DELTAMUX_HOULSBY\), ia3 \(IA3\), .*lora \(LORA\)"):
        Registry().get("lorra")
