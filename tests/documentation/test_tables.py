"""Tables of the documentation are held to the code: methods, options, environment variables, packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deltamux.options import declared
from deltamux.registry import Method, Registry
from deltamux.server.options import ServeOptions
from deltamux_testing.pages import DOCS, ROOT, spans, table, text

METHODS = [method for method in Registry().methods() if method.plugin == method.name]
README = {re.findall(r"\[`(\w+)`\]", row[0])[0]: row for row in table(ROOT / "README.md", "method")}
SOURCES = [ROOT / "runtime", ROOT / "trainers", ROOT / "plugins"]


def test_the_readme_lists_every_method_once() -> None:
    assert sorted(README) == sorted(method.name for method in METHODS)
    assert f"of {len(METHODS)} methods" in text(ROOT / "README.md")
    assert f"of {len(METHODS)} fine-tuning methods" in text(DOCS / "index.md")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_readmes_row_of_a_method_is_that_of_the_registry(method: Method) -> None:
    name, paper, merges, files = README[method.name]
    assert f"(docs/methods/{method.name}.md)" in name
    assert f"({method.info.paper})" in paper
    assert merges == ("yes" if method.info.merges else "no")
    assert files == ("PEFT" if method.info.in_peft else "own")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_index_of_methods_agrees(method: Method) -> None:
    rows = [row for row in table(DOCS / "methods" / "README.md", "method") if f"({method.name}.md)" in row[0]]
    ((_, _, _, merges, files),) = rows
    assert merges.startswith("no") != method.info.merges
    assert files.startswith("PEFT") == method.info.in_peft


def test_the_readme_is_read_in_minutes() -> None:
    assert 700 <= len(text(ROOT / "README.md").split()) <= 900


def test_operations_lists_every_option_of_serve_with_its_default() -> None:
    rows = {flag: row for row in table(DOCS / "operations.md", "option") for flag in re.findall(r"--[\w-]+", row[0])}
    for name, option in declared(ServeOptions).items():
        flag = f"--{'no-' if option.default is True else ''}{name.replace('_', '-')}"
        assert flag in rows, f"{flag} is missing"
        if isinstance(option.default, int | float | str) and not isinstance(option.default, bool):
            assert rows[flag][1] == f"`{option.default}`", f"{flag} is {option.default!r}, not {rows[flag][1]}"


def test_operations_lists_every_environment_variable_that_the_code_reads() -> None:
    listed = {name for row in table(DOCS / "operations.md", "variable") for name in re.findall(r"\w+", row[0])}
    reading = re.compile(
        r"environ(?:\.\w+\(|\[)\"(\w+)\"|^SWITCH = \"(\w+)\"|^.*\"(\w+)\" in os\.environ", re.MULTILINE
    )
    read = {
        name
        for source in SOURCES
        for path in source.rglob("*.py")
        for found in reading.findall(path.read_text(encoding="utf-8"))
        for name in found
        if name
    }
    assert read - {"PYTEST_XDIST_WORKER"} <= listed
    assert {"DELTAMUX_SERVER", "DELTAMUX_API_KEY", "DELTAMUX_KERNELS"} <= read


def packages() -> set[str]:
    found = {
        ".".join(path.parent.relative_to(source).parts)
        for source in SOURCES
        for path in source.rglob("__init__.py")
        if "examples" not in path.parts
    }
    return {package for package in found if package}


def test_architecture_has_a_line_for_every_package() -> None:
    listed: set[str] = set()
    for row in table(DOCS / "architecture.md", "package"):
        first, *others = re.findall(r"`([\w.]+)`", row[0])
        listed |= {first, *(first + name if name.startswith(".") else name for name in others)}
    assert packages() == listed


def test_architecture_names_classes_that_are_there() -> None:
    sources = "\n".join(p.read_text(encoding="utf-8") for source in SOURCES for p in source.rglob("*.py"))
    protos = "\n".join(p.read_text(encoding="utf-8") for p in Path(ROOT / "proto").rglob("*.proto"))
    foreign = {"AsyncLLM", "LoRARequest"}
    named = {span.split(".")[0] for span in spans(DOCS / "architecture.md") if re.match(r"[A-Z]\w*[a-z]\w*\b", span)}
    defined = set(re.findall(r"class (\w+)", sources)) | set(re.findall(r"rpc (\w+)", protos)) | foreign
    assert named <= defined
