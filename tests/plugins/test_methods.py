"""What every method promises, held over all registered ones; and what a broken plugin cannot do."""

from __future__ import annotations

import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import third_party
import torch
from adapters import read_program, write_own
from engine import worlds
from transformers import AutoModelForCausalLM

from deltamux.deltas import BaseModel, Bias, Checkpoint, Program, attached
from deltamux.errors import InvalidAdapterError, InvalidConfigError, NotMergeableError, PluginError, UnknownMethodError
from deltamux.hookspecs import MethodInfo, hookimpl
from deltamux.registry import Registry, create_plugin_manager

IDS = torch.tensor([[5, 17, 99, 200, 3, 42]])
METHODS = Registry().names()
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "opt")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.save_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def base(directory: Path) -> BaseModel:
    return BaseModel.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory)
    return loaded.eval().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    values: torch.Tensor = model(IDS).logits
    return values


@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_adapter_is_the_identity_and_every_parameter_learns(name: str, base: BaseModel, model: Any) -> None:
    method = Registry().get(name)
    config = method.parse({})
    parameters: dict[str, torch.Tensor] = {}
    for parameter, spec in method.parameters(config, base).items():
        parameters[parameter] = torch.empty(spec.shape)
        spec.init(parameters[parameter])
        parameters[parameter].requires_grad_()
    plain = logits(model)
    with attached(model, base, lambda: method.program(config, base, method.export(config, base, parameters))):
        # What stands in front of the prompt is seen from the start, as in the papers.
        if not method.program(config, base, method.export(config, base, parameters)).num_virtual_tokens:
            torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)
        for tensor in parameters.values():
            tensor.data += 0.05 * torch.randn_like(tensor)
        changed = logits(model)
        changed.square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it so
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert [n for n, t in parameters.items() if t.grad is None or not t.grad.any()] == []
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(logits(model), plain), "detached, the base is what it was, bit for bit"


@pytest.mark.parametrize("name", METHODS)
def test_merging_equals_attaching_or_is_refused_with_the_reason(
    name: str, base: BaseModel, directory: Path, tmp_path: Path
) -> None:
    method = Registry().get(name)
    write_own(name, base, tmp_path)
    checkpoint = Checkpoint.read(tmp_path)
    config = method.parse(checkpoint.config)
    if not method.info.merges:
        with pytest.raises(NotMergeableError, match=r"cannot be merged: .*Serve it as an adapter"):
            method.merge(config, base, checkpoint.tensors)
        return
    sites: list[Any] = [*base.linears, *base.norms]
    if name == "bitfit" and not all(site.has_bias for site in sites):
        with pytest.raises(NotMergeableError, match="has no bias that could hold the adapter's"):
            method.merge(config, base, checkpoint.tensors)
        return
    merged: Any = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter, tensor in method.merge(config, base, checkpoint.tensors).items():
            merged.get_parameter(parameter).copy_(tensor)
        plain: Any = AutoModelForCausalLM.from_pretrained(directory)
        with attached(plain, base, read_program(tmp_path, base)):
            torch.testing.assert_close(logits(merged), logits(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_file_that_lacks_a_tensor_or_has_one_too_many_is_refused(name: str, base: BaseModel, tmp_path: Path) -> None:
    method = Registry().get(name)
    write_own(name, base, tmp_path)
    checkpoint = Checkpoint.read(tmp_path)
    config = method.parse(checkpoint.config)
    first = next(iter(checkpoint.tensors))
    with pytest.raises(InvalidAdapterError, match=first.replace(".", r"\.")) as missing:
        method.program(config, base, {n: t for n, t in checkpoint.tensors.items() if n != first})
    assert missing.value.reason == "MISSING_TENSOR"
    with pytest.raises(InvalidAdapterError, match="stray") as stray:
        method.program(config, base, {**checkpoint.tensors, "stray": torch.zeros(1)})
    assert stray.value.reason == "UNCLAIMED_TENSOR"


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_option_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidConfigError, match="has no option 'colour'; it has: "):
        Registry().get(name).parse({"colour": "blue"})


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


def test_what_is_skipped_is_not_imported_and_what_is_imported_is_announced_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(third_party.install(tmp_path, {"hangs": "raise AssertionError('imported')"}))
    steps: list[tuple[str, str]] = []

    def announce(plugin: str, step: str) -> None:
        steps.append((plugin, step))

    registry = Registry(create_plugin_manager(skip={"hangs": "it hangs"}, announce=announce), announce=announce)
    assert registry.broken == {"hangs": "it hangs"}
    assert "hangs" not in {plugin for plugin, _ in steps}
    assert [step for plugin, step in steps if plugin == "lora"] == [
        "its import",
        "the look at its hooks",
        "deltamux_method",
    ]


def test_a_plugin_that_fails_to_recognise_a_checkpoint_hides_it_from_no_other() -> None:
    checkpoint = Checkpoint({"peft_type": "FOREIGN"}, {})
    failing = {**GOOD, "deltamux_method": lambda: info("aaa"), "deltamux_recognise": lambda checkpoint: 42}
    knowing = {**GOOD, "deltamux_recognise": lambda checkpoint: checkpoint}
    assert registry_with(aaa=failing, good=knowing).recognise(checkpoint)[0].name == "good"
    with pytest.raises(PluginError, match="'aaa': deltamux_recognise returned int"):
        registry_with(aaa=failing).recognise(checkpoint)


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
