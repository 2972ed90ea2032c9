"""docs/plugins and the README's method are held to the code, and the tutorial is the example."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, get_args

import pytest

from deltamux import hookspecs
from deltamux.conformance import CHECKS, Case, cases
from deltamux.deltas import Site
from deltamux.deltas.ops import OPS
from deltamux.registry import Registry, create_plugin_manager
from deltamux_testing import pages
from deltamux_testing.pages import ROOT, blocks

DOCS = pages.DOCS / "plugins"
EXAMPLE = ROOT / "plugins" / "examples" / "red"


def text(name: str) -> str:
    return pages.text(DOCS / f"{name}.md")


HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("deltamux_")}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_listed_with_its_exact_arguments(name: str) -> None:
    arguments = ", ".join(inspect.signature(HOOKS[name]).parameters)
    assert f"| `{name}` | {f'`{arguments}`' if arguments else 'none'} |" in text("hooks")
    assert f"**`{name}`**" in text("hooks")
    assert HOOKS[name].__doc__


def test_every_part_of_a_schedule_is_documented() -> None:
    parts = [name for name in vars(hookspecs.TrainingSchedule) if not name.startswith("_")]
    assert [name for name in [*parts, "state"] if f"`{name}" not in text("hooks")] == []


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_listed_with_its_parameters(name: str) -> None:
    lines = text("ops").splitlines()
    row = next(line for line in lines if line.startswith("| `") and f"`{OPS[name].__name__}`" in line)
    assert [field.name for field in dataclasses.fields(OPS[name]) if f"`{field.name}`" not in row] == []


@pytest.mark.parametrize("kind", get_args(Site), ids=lambda kind: str(kind.__name__))
def test_every_site_is_listed_with_its_fields(kind: Any) -> None:
    names = {field.name for field in dataclasses.fields(kind)} - {"name", "kind", "module", "layer"}
    assert any(all(f"`{name}`" in line for name in names) for line in text("ops").splitlines())


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_is_listed_with_its_docstring(name: str) -> None:
    assert f"| `{name}` | {(CHECKS[name].__doc__ or '').strip()} |" in text("conformance")


@pytest.mark.parametrize("file", ["deltamux_red/edit.py", "deltamux_red/method.py"])
def test_the_tutorial_shows_the_example_as_it_is(file: str) -> None:
    assert f"```python\n{(EXAMPLE / file).read_text(encoding='utf-8')}```" in text("tutorial")


def test_the_tutorials_entry_points_are_the_examples() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", text("tutorial"), re.DOTALL)
    assert block in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def readme_method() -> Iterator[list[Case]]:
    """Cases of the method that the README writes, on a base without biases and on one with them."""
    (block,) = (b for b in blocks(ROOT / "README.md", "python") if "deltamux_method" in b.text)
    plugin = sys.modules["readme_method"] = ModuleType("readme_method")
    exec(compile(block.text, str(block), "exec"), vars(plugin))
    manager = create_plugin_manager()
    manager.register(plugin, name="shift")
    yield cases("shift", registry=Registry(manager), architectures=("llama", "gpt2"))
    del sys.modules["readme_method"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_the_readmes_method_passes_every_check(name: str, readme_method: list[Case]) -> None:
    for case in readme_method:
        CHECKS[name](case)


def test_every_page_is_linked() -> None:
    assert {path.stem for path in DOCS.glob("*.md")} == {"README", *re.findall(r"\((\w+)\.md\)", text("README"))}
