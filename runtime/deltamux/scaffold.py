"""Writes the beginning of a plugin: an installable package with a method that works, its test and its README."""

import re
from pathlib import Path
from string import Template

from deltamux.errors import FailedPreconditionError, InvalidArgumentError

PYPROJECT = """\
[build-system]
requires = ["setuptools>=78"]
build-backend = "setuptools.build_meta"

[project]
name = "deltamux-$dashed"
version = "0.1.0"
description = "$title: a fine-tuning method for deltamux."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["deltamux[methods]"]

[project.optional-dependencies]
dev = ["pytest>=9,<10"]

[project.entry-points."deltamux.methods"]
$name = "deltamux_$name.method"

[tool.setuptools]
packages = ["deltamux_$name"]
"""

METHOD = '''\
"""$title: a trained bias after every attention. Replace this by the paper's name, link and formula.

    y = W x + b

Served as `Bias`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux import hookimpl
from deltamux.deltas import BaseModel, Bias, BlockRole, Program
from deltamux.hookspecs import MethodInfo, ParameterSpec


@dataclass(frozen=True)
class ${camel}Config:
    """The method's options: keys of adapter_config.json, of YAML files and of ``--set``.

    Attributes:
        scale: what the bias is multiplied by.
    """

    scale: float = 1.0


@hookimpl
def deltamux_parameters(config: ${camel}Config, base: BaseModel) -> dict[str, ParameterSpec]:
    return {f"{name}.bias": ParameterSpec((base.dims.hidden_size,), torch.nn.init.zeros_) for name in _sites(base)}


@hookimpl
def deltamux_program(config: ${camel}Config, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    return Program.of((name, Bias(config.scale * tensors[f"{name}.bias"])) for name in _sites(base))


def _sites(base: BaseModel) -> list[str]:
    return [block.output_module for block in base.blocks if block.role is BlockRole.ATTENTION]


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="$name",
        title="$title",
        summary="a bias after every attention",
        paper="https://example.org/your-paper",
        peft_type="$upper",
        config_class=${camel}Config,
        merges=True,
        in_peft=False,
        learning_rate=1e-3,
        learning_rate_source="where this rate comes from",
    )
'''

TEST = '''\
"""The method passes every check of deltamux's conformance suite."""

import pytest

from deltamux.conformance import CHECKS, cases, check_serving


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("case", cases("$name"), ids=str)
def test_every_check_passes(case, check):
    check(case)


def test_what_is_served_is_what_was_trained():
    check_serving(cases("$name"))
'''

README = """\
# $title

A fine-tuning method for [deltamux](https://pypi.org/project/deltamux/).

```bash
pip install -e '.[dev]'
deltamux plugin check deltamux-$dashed                          # every check, and the real engine
deltamux train --method $name --model MODEL --data train.jsonl --output out
```

The method is `deltamux_$name/method.py`. Its hooks, the ops that it may place and their sites are described in
deltamux's docs/plugins.
"""

FILES = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "deltamux_$name/__init__.py": "",
    "deltamux_$name/method.py": METHOD,
    "tests/test_$name.py": TEST,
}


def new_plugin(name: str, parent: Path) -> Path:
    """Writes the package into ``parent/deltamux-NAME``, and returns that directory.

    Raises:
        InvalidArgumentError: the name is not an identifier in lower case.
        FailedPreconditionError: the directory exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InvalidArgumentError(
            f"{name!r} is not a name for a method: use lower-case letters, digits and _", metadata={"field": "name"}
        )
    words = name.split("_")
    values = {
        "name": name,
        "dashed": name.replace("_", "-"),
        "title": " ".join(word.capitalize() for word in words),
        "camel": "".join(word.capitalize() for word in words),
        "upper": name.upper(),
    }
    directory = parent / f"deltamux-{values['dashed']}"
    if directory.exists():
        raise FailedPreconditionError(f"{directory} exists: choose another name or directory", reason="OUTPUT_EXISTS")
    for path, text in FILES.items():
        file = directory / Template(path).substitute(values)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(values), encoding="utf-8")
    return directory
