"""Reads single tensors out of a base model's safetensors files, without loading the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from deltamux.errors import FailedPreconditionError

SAMPLE = 64
"""Values of each tensor that a fingerprint looks at."""


class WeightFiles:
    """The tensors of a model directory by name.

    Names are paths in the causal-LM model. A checkpoint saved from the headless model lacks the leading component
    (``h.0...`` for ``transformer.h.0...``): such names resolve too.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    @classmethod
    def locate(cls, model: str | Path) -> WeightFiles:
        """Finds the safetensors of a directory or of a Hugging Face id (downloading them as transformers would)."""
        directory = Path(model)
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            directory = Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json"]))
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return cls({name: directory / file for name, file in weight_map.items()})
        single = directory / "model.safetensors"
        if not single.is_file():
            raise FailedPreconditionError(
                f"{directory} has no model.safetensors; save the base with save_pretrained(safe_serialization=True)",
                reason="BASE_NOT_FOUND",
            )
        with safe_open(single, framework="pt") as file:
            return cls(dict.fromkeys(file.keys(), single))

    def names(self) -> list[str]:
        return sorted(self._files)

    def files(self) -> dict[Path, list[str]]:
        """Returns each file, with the names of the tensors in it, as they are stored."""
        found: dict[Path, list[str]] = {}
        for name in self.names():
            found.setdefault(self._files[name], []).append(name)
        return found

    def place(self, name: str) -> tuple[Path, str]:
        """Returns the file that holds a parameter, and the name that it has there; KeyError where there is none."""
        stored = self._resolve(name)
        return self._files[stored], stored

    def read(self, name: str) -> Tensor:
        stored = self._resolve(name)
        with safe_open(self._files[stored], framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def sample(self, name: str) -> np.ndarray[Any, np.dtype[np.int16]]:
        """Returns the first values of a tensor, rounded to bfloat16, as their bits."""
        with safe_open(self._files[name], framework="pt") as file:
            view = file.get_slice(name)
            shape = view.get_shape()
            part = view[:1] if shape else file.get_tensor(name)
        values = part.reshape(-1)[:SAMPLE].to(torch.bfloat16)
        bits: np.ndarray[Any, np.dtype[np.int16]] = values.view(torch.int16).numpy()
        return bits

    def _resolve(self, name: str) -> str:
        if name in self._files:
            return name
        headless = name.partition(".")[2]
        if headless in self._files:
            return headless
        raise KeyError(name)
