"""Reads single tensors out of a base model's safetensors files, without loading the model."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deltamux.errors import FailedPreconditionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = 64
"""Values of each tensor in a fingerprint."""


class WeightFiles:
    """The tensors of a model directory by name.

    Names are paths in the causal-LM model. A checkpoint saved from the headless model lacks the leading component
    (``h.0...`` for ``transformer.h.0...``): such names resolve too.
    """

    def __init__(self, files: Mapping[str, Path], aliases: Mapping[str, str] | None = None) -> None:
        self._files = dict(files)
        self._aliases = dict(aliases or {})

    @classmethod
    def locate(cls, model: str | Path) -> Self:
        """Finds the safetensors of a directory or of a Hugging Face id (downloading them as transformers would).

        Raises:
            FailedPreconditionError: there are none, or one of them or their index is missing or damaged.
        """
        directory = Path(model)
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            directory = Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json"]))
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            return cls(_indexed(index))
        single = directory / "model.safetensors"
        if not single.is_file():
            raise FailedPreconditionError(
                f"{directory} has no model.safetensors; save the base with save_pretrained(safe_serialization=True)",
                reason="BASE_NOT_FOUND",
            )
        with _opened(single) as file:
            return cls(dict.fromkeys(file.keys(), single))

    def named_for(self, model: nn.Module) -> Self:
        """Returns the same files, whose tensors have the names as well that transformers loads them by into `model`."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        conversions = get_model_conversion_mapping(cast("PreTrainedModel", model))
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        aliases: dict[str, str] = {}
        for stored in self._files:
            name = stored
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            aliases[name] = stored
        return type(self)(self._files, aliases)

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
        with _opened(self._files[stored]) as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def rows(self, name: str, first: int, stop: int, *, transposed: bool = False) -> Tensor:
        """Returns rows [stop - first, in_features] of a weight; KeyError where there is none of that name.

        Args:
            transposed: the weight is stored as [in_features, out_features].
        """
        stored = self._resolve(name)
        with _opened(self._files[stored]) as file:
            view = file.get_slice(stored)
            part: Tensor = view[:, first:stop].T if transposed else view[first:stop]
        return part

    def sample(self, name: str) -> np.ndarray[Any, np.dtype[np.int16]]:
        """Returns the first values of a tensor, rounded to bfloat16, as their bits."""
        with _opened(self._files[name]) as file:
            view = file.get_slice(name)
            shape = view.get_shape()
            part = view[:1] if shape else file.get_tensor(name)
        values = part.reshape(-1)[:SAMPLE].to(torch.bfloat16)
        bits: np.ndarray[Any, np.dtype[np.int16]] = values.view(torch.int16).numpy()
        return bits

    def _resolve(self, name: str) -> str:
        if name in self._files:
            return name
        if name in self._aliases:
            return self._aliases[name]
        headless = name.partition(".")[2]
        if headless in self._files:
            return headless
        raise KeyError(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a file of weights to read from it.

    Raises:
        FailedPreconditionError: BASE_DAMAGED, it is missing, cut short or damaged, or lacks a tensor of its index.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        problem = f"cannot be read: {str(error).partition(chr(10))[0]}"
        raise _damaged(path, problem if path.exists() else "is missing") from error


def _indexed(index: Path) -> dict[str, Path]:
    """Returns the file of each tensor that an index of weights names."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): index.parent / file for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, "is not an index of weights: an object with a weight_map is needed") from error


def _damaged(path: Path, problem: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{path}, of the base model, {problem}; where it is damaged, copy or download it again",
        reason="BASE_DAMAGED",
        metadata={"file": path.name},
    )
