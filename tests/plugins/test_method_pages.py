"""docs/methods is held to the code: a page for every method, with its options, defaults, files and ops as they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from deltamux.conformance import cases
from deltamux.registry import Method, Registry
from deltamux_testing.pages import DOCS, text

PAGES = DOCS / "methods"
METHODS = [method for method in Registry().methods() if method.plugin == method.name]


def page(method: Method) -> str:
    return text(PAGES / f"{method.name}.md")


def shown(value: Any) -> str | None:
    """Returns a default as a page shows it; None for a config within a config, which has a page of its own."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | dict) and not value:
        return "[]" if isinstance(value, tuple) else "{}"
    return None if dataclasses.is_dataclass(value) else str(value)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_page_has_every_option_with_its_default(method: Method) -> None:
    lines = page(method).splitlines()
    for field in dataclasses.fields(method.info.config_class):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        (row,) = [line for line in lines if line.startswith(f"| `{field.name}` |")]
        _, _, default, meaning = (part.strip() for part in row.split("|", 3))
        expected = shown(value)
        assert expected is None or default == f"`{expected}`", f"{field.name} is {expected}, the page says {default}"
        assert len(meaning) > 3, f"the page does not say what {field.name} means"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_page_has_its_files_its_rate_and_its_source(method: Method) -> None:
    info, told = method.info, page(method)
    facts = [
        info.title,
        f"`peft_type` {info.peft_type}",
        info.paper,
        f"| merges | {'yes' if info.merges else 'refused'}",
    ]
    if info.trains:
        width = f" at hidden size {info.learning_rate_width}," if info.learning_rate_width else ";"
        facts += [f"| learning rate | {info.learning_rate:g}{width}", info.learning_rate_source]
        facts.append(f"--method {method.name}")
    assert [fact for fact in facts if fact not in told] == []


@pytest.mark.parametrize("method", [m for m in METHODS if m.info.trains], ids=lambda method: method.name)
def test_a_page_names_the_ops_that_the_method_places(method: Method) -> None:
    case = cases(method.name)[0]
    (row,) = [line for line in page(method).splitlines() if line.startswith("| ops |")]
    placed = {type(op).__name__ for _, op in case.program(case.checkpoint())}
    assert {name for name in placed if f"`{name}`" not in row} == set()


def test_every_method_has_its_page_and_every_page_its_method() -> None:
    pages = {path.stem for path in PAGES.glob("*.md")} - {"README", "scores"}
    assert pages == {method.name for method in METHODS}
