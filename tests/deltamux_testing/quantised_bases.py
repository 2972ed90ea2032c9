"""Bases whose projections are stored in 8 bits, as compressed-tensors writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Kind = Literal["int8", "float8"]
LARGEST = {"int8": 127.0, "float8": 448.0}


def write_quantised(base: Path, directory: Path, kind: Kind) -> Path:
    """Writes a base with its projections quantised per output (W8A8); returns it dequantised, in another directory."""
    plain = directory.with_name(f"{directory.name}-dequantised")
    for copy in (directory, plain):
        shutil.copytree(base, copy)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = values[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / LARGEST[kind]
        codes = (weight / scale).round().to(torch.int8) if kind == "int8" else (weight / scale).to(torch.float8_e4m3fn)
        stored |= {name: codes, f"{name}_scale": scale}
        values[name] = codes.float() * scale
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = _quantization(kind)
    (directory / "config.json").write_text(json.dumps(config))
    return plain


def _quantization(kind: Kind) -> dict[str, object]:
    of_all = {"num_bits": 8, "type": kind.rstrip("8"), "symmetric": True}
    weights, inputs = of_all | {"strategy": "channel"}, of_all | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind.rstrip('8')}-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
