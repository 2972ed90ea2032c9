"""The header of a safetensors file, read by its bytes: nothing is allocated or computed for what it merely claims."""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import torch

from deltamux.deltas.bounded_json import MAX_NAME, Bounds, JSONRefusedError, parse_object
from deltamux.errors import InvalidAdapterError

LENGTH_BYTES = 8
"""Size of the header's length at the beginning of a file, little-endian."""

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_NAME_BYTES = 512
MAX_TENSOR_BYTES = 1 << 48
"""Of a tensor's sizes multiplied, those that are 0 left out: torch computes strides with them."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of programs, by the format's names."""

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""Further dtypes of adapters."""

BITS = {name: 8 * dtype.itemsize for name, dtype in (DTYPES | FLOAT8).items()}
BITS |= {"U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
"""Bits of an item of every dtype that the format has."""

PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")

_BOUNDS = Bounds(depth=3, values=8 * MAX_TENSORS, literal=15, natural=True)
_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorEntry(NamedTuple):
    """One tensor of a header.

    Attributes:
        begin, end: its bytes, counted from the end of the header.
        dtype: as the format names it, such as ``BF16``.
    """

    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any]) -> Self:
        """Returns the tensor of a header that is known to be valid."""
        begin, end = values["data_offsets"]
        return cls(begin, end, name, values["dtype"], tuple(values["shape"]))


class Header(NamedTuple):
    """A checked header.

    Attributes:
        tensors: in the order of the file; together they are exactly what follows the header.
        metadata: the format's free strings.
    """

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks a header; takes at most a few hundred bytes of memory for each tensor.

    Raises:
        InvalidAdapterError: the file is missing, irregular, a pickle or truncated; its header is not valid JSON,
            exceeds a bound of this module, or has tensors that overlap, leave gaps, or lie outside the file. The
            metadata name the file and, where there is one, the tensor.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            _refuse(path, "is not a regular file", "INVALID_FILE")
        header = _read(path, status.st_size)
    except FileNotFoundError:
        _refuse(path, "is missing", "MISSING_FILE")
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}", "INVALID_FILE")
    try:
        values = parse_object(header, _BOUNDS)
    except JSONRefusedError as error:
        _refuse(path, f"has a damaged header: {error}", "DAMAGED_FILE", error.entry)
    metadata = _metadata(path, values.pop("__metadata__", {}))
    if len(values) > MAX_TENSORS:
        _refuse(path, f"has {len(values)} tensors; at most {MAX_TENSORS} are read", "DAMAGED_FILE")
    tensors = tuple(sorted(_entry(path, name, entry) for name, entry in values.items()))
    _check_spans(path, tensors, status.st_size - LENGTH_BYTES - len(header))
    return Header(tensors, metadata)


def _read(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if len(start) < LENGTH_BYTES or length > size - LENGTH_BYTES:
            # Only here: the length of a header may well begin with the same bytes, as that of 640 bytes does.
            if start.startswith(PICKLE_MAGIC):
                _refuse(path, "is a pickle, which is never read: save it as safetensors", "PICKLE")
            problem = f"claims a header of {length} bytes, but has {size} bytes in all"
            _refuse(path, f"{problem}: it is truncated, or not a safetensors file", "DAMAGED_FILE")
        if length > MAX_HEADER_BYTES:
            _refuse(path, f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read", "DAMAGED_FILE")
        header = file.read(length)
    if len(header) < length or not header.startswith(b"{"):
        _refuse(path, "has a damaged header: it is not a JSON object", "DAMAGED_FILE")
    return header


def _metadata(path: Path, values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        _refuse(path, "has a damaged header: __metadata__ is not an object of strings", "DAMAGED_FILE", "__metadata__")
    return values


def _entry(path: Path, name: str, entry: Any) -> TensorEntry:
    """Returns a tensor's entry, every value checked for type and range before anything is computed with it."""
    if len(name.encode()) > MAX_NAME_BYTES:
        _refuse_tensor(path, name, f"has a name of {len(name.encode())} bytes; at most {MAX_NAME_BYTES} are read")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        _refuse_tensor(path, name, f"is not described by exactly {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse_tensor(path, name, f"has dtype {dtype!r:.80}, which the format does not have")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        _refuse_tensor(path, name, f"has a shape that is not a list of at most {MAX_DIMENSIONS} dimensions")
    if not all(map(_is_count, shape)):
        _refuse_tensor(path, name, f"has shape {shape!r:.120}, which is not one of whole numbers from 0 on")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        _refuse_tensor(path, name, "has data_offsets that are not two whole numbers from 0 on")
    begin, end = offsets
    bits = _bits(path, name, shape, BITS[dtype])
    if bits != 8 * (end - begin):
        _refuse_tensor(path, name, f"takes {bits} bits by its shape and dtype, but has {end - begin} bytes")
    return TensorEntry.of(name, entry)


def _bits(path: Path, name: str, shape: list[int], item: int) -> int:
    bits = item
    for dimension in shape:
        bits *= max(dimension, 1)
        if bits > 8 * MAX_TENSOR_BYTES:
            _refuse_tensor(path, name, f"has shape {shape}, which is more than {MAX_TENSOR_BYTES} bytes")
    return 0 if 0 in shape else bits


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_spans(path: Path, tensors: tuple[TensorEntry, ...], num_bytes: int) -> None:
    expected = 0
    for tensor in tensors:
        if tensor.begin != expected:
            _refuse_tensor(path, tensor.name, "overlaps another or leaves a gap")
        expected = tensor.end
    if expected != num_bytes:
        problem = f"has {num_bytes} bytes of tensors, but its header claims {expected}"
        _refuse(path, f"{problem}: it is truncated or damaged", "TRUNCATED_FILE")


def _refuse_tensor(path: Path, name: str, problem: str) -> NoReturn:
    shown = name[:MAX_NAME]
    message, metadata = f"tensor {shown!r} of {path.name} {problem}", {"file": path.name, "tensor": shown}
    raise InvalidAdapterError(message, reason="DAMAGED_FILE", metadata=metadata)


def _refuse(path: Path, problem: str, reason: str, tensor: str = "") -> NoReturn:
    metadata = {"file": path.name} | ({"tensor": tensor[:MAX_NAME]} if tensor else {})
    raise InvalidAdapterError(f"{path.name} {problem}", reason=reason, metadata=metadata) from None
