"""docs/plugins keeps its promises: all is listed as it is, and the tutorial is the example."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from deltamux import hookspecs
from deltamux.conformance import CHECKS
from deltamux.deltas import Site
from deltamux.deltas.ops import OPS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "plugins"
EXAMPLE = ROOT / "plugins" / "examples" / "red"


def text(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("deltamux_")}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_listed_with_its_exact_arguments(name: str) -> None:
    arguments = ", ".join(inspect.signature(HOOKS[name]).parameters)
    assert f"| `{name}` | {f'`{arguments}`' if arguments else 'none'} |" in text("hooks")
    assert f"**`{name}`**" in text("hooks")
    assert HOOKS[name].__doc__


def test_every_part_of_a_schedule_is_told() -> None:
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
def test_every_promise_is_told_in_its_own_words(name: str) -> None:
    assert f"| `{name}` | {(CHECKS[name].__doc__ or '').strip()} |" in text("conformance")


@pytest.mark.parametrize("file", ["deltamux_red/edit.py", "deltamux_red/method.py"])
def test_the_tutorial_shows_the_example_as_it_is(file: str) -> None:
    assert f"```python\n{(EXAMPLE / file).read_text(encoding='utf-8')}```" in text("tutorial")


def test_the_tutorials_entry_points_are_the_examples() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", text("tutorial"), re.DOTALL)
    assert block in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")


def test_every_page_is_linked() -> None:
    assert {path.stem for path in DOCS.glob("*.md")} == {"README", *re.findall(r"\((\w+)\.md\)", text("README"))}
