"""Reads single tensors out of a base model's safetensors files, without loading the model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deltamux.deltas.conversions import Conversion, conversions_of
from deltamux.deltas.quantised import CODES, PLAIN, ZERO_POINT, packed_as, quantised_error, scale_name, values
from deltamux.errors import FailedPreconditionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = 64
"""Values of each tensor in a fingerprint."""


class WeightFiles:
    """The tensors of a model directory by name.

    Names are paths in the causal-LM model. A checkpoint saved from the headless model lacks the leading component
    (``h.0...`` for ``transformer.h.0...``): such names resolve too. So do those of parameters that transformers makes
    of several stored tensors (a mixture's experts), once the files are `named_for` a model.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        aliases: Mapping[str, str] | None = None,
        conversions: Mapping[str, Conversion] | None = None,
    ) -> None:
        self._files = dict(files)
        self._aliases = dict(aliases or {})
        self._conversions = dict(conversions or {})

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
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if index.is_file():
            places = _indexed(index)
            if single.is_file() and single not in places.values():
                raise FailedPreconditionError(
                    f"{directory} has both {single.name} and an index of other files: transformers reads the one, vLLM "
                    "the others. Delete what is not the base's",
                    reason="BASE_DAMAGED",
                    metadata={"file": single.name},
                )
            return cls(places)
        if not single.is_file():
            raise FailedPreconditionError(
                f"{directory} has no model.safetensors; save the base with save_pretrained(safe_serialization=True)",
                reason="BASE_NOT_FOUND",
            )
        with _opened(single) as file:
            return cls(dict.fromkeys(file.keys(), single))

    def named_for(self, model: nn.Module) -> Self:
        """Returns the same files, whose tensors have the names as well that transformers loads them by into `model`."""
        renamed, conversions = conversions_of(cast("PreTrainedModel", model), self._files)
        return type(self)(self._files, renamed, conversions)

    def names(self) -> list[str]:
        return sorted(self._files)

    def prefixes(self) -> set[tuple[str, str]]:
        """Returns what paths begin with in the model and what in the files, where that differs for whole parts of it.

        So it does where the model is a part of the one that was saved: the language model of one that reads images.
        """
        found: set[tuple[str, str]] = set()
        for name, stored in self._aliases.items():
            own, other = name.split("."), stored.split(".")
            while own and other and own[-1] == other[-1]:
                own, other = own[:-1], other[:-1]
            if (own or other) and not any(piece.isdigit() for piece in (*own, *other)):
                found.add((".".join(own), ".".join(other)))
        return found

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

    def places(self, name: str) -> list[tuple[Path, str]]:
        """Returns as `place` does, for a parameter of one stored tensor or of several."""
        if name in self._conversions:
            return [(self._files[stored], stored) for stored in self._conversions[name].stored]
        return [self.place(name)]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a parameter as it is stored; None for one that is stored in parts; KeyError for none."""
        if name in self._conversions:
            return None
        path, stored = self.place(name)
        with _opened(path) as file:
            return tuple(file.get_slice(stored).get_shape())

    def as_stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Returns a value of a parameter as the stored tensors that it is made of, by their names there."""
        if name in self._conversions:
            return self._conversions[name].reverse(tensor)
        return {self._resolve(name): tensor}

    def experts(self, name: str, chosen: Sequence[int]) -> Tensor:
        """Returns some experts' parts [len(chosen), ...] of a parameter that holds those of all."""
        if name in self._conversions:
            return self._conversions[name].experts(chosen, self._read_stored)
        stored = self._resolve(name)
        with _opened(self._files[stored]) as file:
            view = file.get_slice(stored)
            return torch.cat([view[expert : expert + 1] for expert in chosen])

    def read(self, name: str) -> Tensor:
        """Returns a tensor, in float32 where it is stored quantised; KeyError where there is none of that name.

        Raises:
            QuantisedBaseError: its values cannot be read.
        """
        if name in self._conversions:
            return self._conversions[name].convert(self._read_stored)
        return self._read_stored(name)

    def _read_stored(self, name: str) -> Tensor:
        """Returns one stored tensor, which may have the name of the parameter that is made of it."""
        stored = self._stored(name)
        with _opened(self._files[stored]) as file:
            tensor: Tensor = file.get_tensor(stored)
        return self._values(stored, tensor, 0, len(tensor)) if tensor.ndim == 2 else tensor

    def rows(self, name: str, first: int, stop: int, *, transposed: bool = False) -> Tensor:
        """Returns rows [stop - first, in_features] of a weight; raises like `read`.

        Args:
            transposed: the weight is stored as [in_features, out_features].
        """
        stored = self._stored(name)
        with _opened(self._files[stored]) as file:
            view = file.get_slice(stored)
            part: Tensor = view[:, first:stop].T if transposed else view[first:stop]
            count = view.get_shape()[0]
        return self._values(stored, part, first, count)

    def _values(self, stored: str, rows: Tensor, first: int, num_rows: int) -> Tensor:
        """Returns what rows of a matrix of so many are the codes of; the rows themselves where they are plain."""
        if rows.dtype in PLAIN:
            return rows
        kind, scale = str(rows.dtype).removeprefix("torch."), scale_name(stored, self._files)
        if scale is None or rows.dtype not in CODES:
            raise quantised_error(stored, f"{kind} without a known scale beside it")
        zero_point = stored + ZERO_POINT
        zeros = self._raw(zero_point) if zero_point in self._files else None
        found = values(rows, self._raw(scale), zeros, first, num_rows)
        if found is None:
            raise quantised_error(stored, f"{kind} in blocks of several sizes")
        return found

    def _raw(self, stored: str) -> Tensor:
        with _opened(self._files[stored]) as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def sample(self, name: str) -> np.ndarray[Any, np.dtype[np.int16]]:
        """Returns the first values of a tensor, rounded to bfloat16, as their bits."""
        with _opened(self._files[name]) as file:
            view = file.get_slice(name)
            shape = view.get_shape()
            part = view[:1] if shape else file.get_tensor(name)
        values = part.reshape(-1)[:SAMPLE].to(torch.bfloat16)
        bits: np.ndarray[Any, np.dtype[np.int16]] = values.view(torch.int16).numpy()
        return bits

    def _stored(self, name: str) -> str:
        """Returns the name that a tensor has in its file; raises QuantisedBaseError where its values are packed."""
        try:
            stored = self._resolve(name)
        except KeyError:
            packed = packed_as(name, self._files) or packed_as(self._aliases.get(name, name), self._files)
            if packed is None:
                raise
            raise quantised_error(name, f"packed in {packed}") from None
        if (packed := packed_as(stored, self._files)) is not None:
            raise quantised_error(name, f"packed, with {packed}")
        return stored

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
