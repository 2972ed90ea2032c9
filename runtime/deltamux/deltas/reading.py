"""Reads the tensors of a compiled program by few calls, since it has hundreds of them and loads during traffic."""

import hashlib
import json
import math
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from deltamux.deltas.safetensors_header import DTYPES, LENGTH_BYTES, TensorEntry


class ChecksumError(ValueError):
    """A file's content is not that of its checksum."""


def read_tensors(path: Path, sha256: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns all tensors of a safetensors file, as views of one copy of it in memory, and its metadata.

    The file is read before its header is parsed: reading releases the interpreter's lock, while `safe_open` keeps it as
    long as a slow disk takes.

    Args:
        sha256: of the whole file, in hex; "" leaves it unchecked. What is checked is the copy that is used.

    Raises:
        ChecksumError: the file has another checksum.
        OSError: the file cannot be read.
        SafetensorError: it is damaged.
        KeyError, ValueError: it holds a dtype that is not known here, its tensors do not begin at multiples of their
            dtype's size, or it shrank while it was read.
    """
    whole = _read(path)
    if sha256 and (found := hashlib.sha256(whole.numpy().data).hexdigest()) != sha256:
        raise ChecksumError(f"its sha256 is {found}, and {sha256} was stored")
    with safe_open(path, framework="np"):
        pass  # the header is valid
    start = LENGTH_BYTES + int.from_bytes(whole[:LENGTH_BYTES].numpy().tobytes(), "little")
    header = json.loads(whole[LENGTH_BYTES:start].numpy().tobytes())
    metadata: dict[str, str] = header.get("__metadata__") or {}
    entries = sorted(TensorEntry.of(name, values) for name, values in header.items() if name != "__metadata__")
    tensors: dict[str, Tensor] = {}
    for dtype, run in groupby(entries, key=lambda entry: DTYPES[entry.dtype]):
        same = list(run)
        if (start + same[0].begin) % dtype.itemsize:
            raise ValueError(f"{same[0].name} does not begin at a multiple of {dtype.itemsize} bytes")
        block = whole[start + same[0].begin : start + same[-1].end].view(dtype)
        parts = torch.split(block, [math.prod(entry.shape) for entry in same])
        tensors.update((entry.name, part.view(entry.shape)) for entry, part in zip(same, parts, strict=True))
    return tensors, metadata


def _read(path: Path) -> Tensor:
    with path.open("rb", buffering=0) as file:
        whole = torch.empty(path.stat().st_size, dtype=torch.uint8)
        room = whole.numpy().data
        while room and (count := file.readinto(room)):
            room = room[count:]
    if room:
        raise ValueError(f"{len(room)} bytes are missing")
    return whole
