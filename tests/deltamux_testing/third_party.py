"""Distributions of somebody else's plugins, as pip would lay them down: a module, its metadata, its entry points."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

METHOD = """
import os, signal, subprocess, sys, time
from dataclasses import dataclass

import torch
from deltamux.deltas import Bias, Program
from deltamux.hookspecs import MethodInfo, hookimpl


@dataclass(frozen=True)
class Config:
    patience: float = 0.0


@hookimpl
def deltamux_method():
    return MethodInfo("{name}", "{name}", "", "", "{peft_type}", Config, False, False, 1e-3, "")


@hookimpl
def deltamux_parameters(config, base):
    return {{}}


@hookimpl
def deltamux_program(config, base, tensors):
    bias = tensors["bias"]
    {body}
    return Program.of([(base.linears[0].name, Bias(torch.zeros(base.linears[0].out_features) + bias))])
"""


def method(name: str, body: str = "pass", *, peft_type: str = "") -> str:
    """Returns the source of a method that adds a bias, and does something else before."""
    return METHOD.format(name=name, peft_type=peft_type or peft_type_of(name), body=body)


def peft_type_of(name: str) -> str:
    return f"THIRD_{name.upper()}"


def install(
    directory: Path,
    plugins: dict[str, str],
    *,
    distribution: str = "third_party",
    value: str = "",
    group: str = "deltamux.methods",
) -> Path:
    """Writes a distribution with a plugin for each name and source; put the directory on the import path.

    Args:
        value: what an entry point names in its module, such as ``:plugin``; "" for the module itself.
    """
    metadata = directory / f"{distribution}-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
    for name, source in plugins.items():
        (directory / f"{distribution}_{name}.py").write_text(source)
    points = "".join(f"{name} = {distribution}_{name}{value}\n" for name in plugins)
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{points}")
    return directory


def write_adapter(directory: Path, name: str) -> Path:
    """Writes an adapter of one of these methods."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type_of(name)}))
    save_file({"bias": torch.ones(1)}, directory / "adapter_model.safetensors")
    return directory
