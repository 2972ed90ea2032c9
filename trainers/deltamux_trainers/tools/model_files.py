"""The files of a model directory: weights, read and written file by file, and all others, copied as they are."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltamux.deltas.weights import WeightFiles
from deltamux.errors import FailedPreconditionError

INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".tflite",
    ".npz",
)
"""Suffixes of files with weights in some form, which a merge does not copy: they are not merged."""
DTYPE_KEYS = ("dtype", "torch_dtype")

MergeFile = Callable[[Path], Mapping[str, Tensor]]
"""Returns the changed tensors of a file by stored name, in float32."""
Rounding = Callable[[str, Tensor, torch.dtype], Tensor]
"""Returns a changed tensor, of a stored name, in the dtype that it is written in."""


@dataclass(frozen=True)
class ModelFiles:
    """A model's directory, local or downloaded."""

    directory: Path
    weights: WeightFiles

    @classmethod
    def locate(cls, model: str) -> Self:
        """Finds a directory, or downloads all of a Hugging Face id but weights in other formats.

        Raises:
            FailedPreconditionError: there is no such model, or none in safetensors files.
        """
        directory = Path(model)
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"]
            try:
                directory = Path(snapshot_download(model, ignore_patterns=others))
            except (OSError, ValueError) as error:  # the hub client's errors: no such id, no connection
                raise FailedPreconditionError(
                    f"base model {model!r} cannot be read: {str(error).strip().partition(chr(10))[0]}. Give a "
                    "directory with config.json and safetensors, or a Hugging Face id",
                    reason="BASE_NOT_FOUND",
                ) from error
        return cls(directory, WeightFiles.locate(directory))

    def check_plain(self) -> None:
        """Raises FailedPreconditionError where the weights are quantised, or the config is missing or damaged."""
        quantization = self._config().get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise FailedPreconditionError(
                f"the base {self.directory} is quantised ({method}), and its weights cannot take an adapter's change: "
                "merge into the model that it was quantised from, and quantise the result",
                reason="BASE_QUANTISED",
                metadata={"quant_method": str(method)},
            )

    def copy_others(self, destination: Path) -> None:
        """Copies every file but weights, the index of weights, and hidden files."""
        for path in sorted(self.directory.rglob("*")):
            own = path.relative_to(self.directory)
            hidden = any(part.startswith(".") for part in own.parts)
            if hidden or not path.is_file() or path.suffix in WEIGHT_SUFFIXES or own.name.endswith(".index.json"):
                continue
            (destination / own).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, destination / own)

    def write_weights(
        self, destination: Path, merge_file: MergeFile, rounded: Rounding, dtype: torch.dtype | None
    ) -> None:
        """Writes the weights in files of the same names, with one file in memory at a time.

        Args:
            dtype: of all floats; None keeps the dtype of each, and copies files in which nothing changes.
        """
        size = 0
        for file, names in self.weights.files().items():
            changed = merge_file(file)
            written = destination / file.relative_to(self.directory)
            if not changed and dtype is None:
                shutil.copyfile(file, written)
                continue
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
                tensors: dict[str, Tensor] = {}
                for name in names:
                    tensor = opened.get_tensor(name)
                    target = (dtype or tensor.dtype) if tensor.is_floating_point() else tensor.dtype
                    tensors[name] = rounded(name, changed[name], target) if name in changed else tensor.to(target)
                    size += tensors[name].nbytes
            save_file(tensors, written, metadata=metadata or {"format": "pt"})
        self._write_index(destination, size if dtype is not None else None)
        if dtype is not None:
            self._write_dtype(destination, str(dtype).removeprefix("torch."))

    def _write_index(self, destination: Path, size: int | None) -> None:
        if not (self.directory / INDEX_FILE).is_file():
            return
        index = json.loads((self.directory / INDEX_FILE).read_text())
        if size is not None:
            index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        (destination / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _write_dtype(self, destination: Path, dtype: str) -> None:
        config = self._config()
        places = [part for part in _nested(config) if any(key in part for key in DTYPE_KEYS)] or [config]
        for part in places:
            part.update({key: dtype for key in DTYPE_KEYS if key in part} or {"dtype": dtype})
        (destination / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    def _config(self) -> dict[str, Any]:
        path = self.directory / CONFIG_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            problem = "is not a JSON object" if path.exists() else "is missing"
            raise FailedPreconditionError(
                f"{path}, of the base model, {problem}; where it is damaged, copy or download it again",
                reason="BASE_DAMAGED",
                metadata={"file": path.name},
            )
        return values


def _nested(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a config and the configs nested in it, such as text_config."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _nested(value)
