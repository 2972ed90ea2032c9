"""docs/plugins.md keeps its promises: every hook and op is listed as it is, and the example runs."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from engine import worlds
from transformers import AutoModelForCausalLM

from deltamux import hookspecs
from deltamux.deltas import BaseModel, attached
from deltamux.deltas.ops import OPS
from deltamux.registry import Registry, create_plugin_manager

TEXT = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("deltamux_")}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_listed_with_its_exact_arguments(name: str) -> None:
    arguments = ", ".join(inspect.signature(HOOKS[name]).parameters)
    assert f"| `{name}` | {f'`{arguments}`' if arguments else 'none'} |" in TEXT
    assert HOOKS[name].__doc__


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_listed_with_its_parameters(name: str) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith("| `") and f"`{OPS[name].__name__}`" in line)
    assert [field.name for field in dataclasses.fields(OPS[name]) if f"`{field.name}`" not in row] == []


def test_the_example_is_a_working_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "hookimpl" in block)
    plugin = ModuleType("outbias")
    monkeypatch.setitem(sys.modules, "outbias", plugin)  # dataclasses look their module up
    exec(compile(source, "docs/plugins.md", "exec"), plugin.__dict__)
    manager = create_plugin_manager()
    manager.register(plugin, name="outbias")
    registry = Registry(manager)
    assert registry.broken == {}
    directory = worlds.save_base(tmp_path, "gpt2")
    base = BaseModel.from_pretrained(directory)
    method = registry.get("outbias")
    config = method.parse({"scale": 2.0})
    tensors = {name: torch.linspace(-1, 1, *spec.shape) for name, spec in method.parameters(config, base).items()}
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = model(ids).logits
        with attached(model, base, method.program(config, base, tensors)):
            changed = model(ids).logits
        for name, tensor in method.merge(config, base, tensors).items():
            model.get_parameter(name).copy_(tensor)
        torch.testing.assert_close(model(ids).logits, changed, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, changed, atol=1e-2)
