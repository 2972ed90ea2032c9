"""An adapter's files, in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``, nothing else."""

import codecs
import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltamux.adapter_files import CONFIG_FILE as CONFIG_FILE
from deltamux.adapter_files import TENSORS_FILE as TENSORS_FILE
from deltamux.adapter_files import missing
from deltamux.deltas.bounded_json import MAX_NAME, Bounds, JSONRefusedError, parse_object
from deltamux.deltas.safetensors_header import DTYPES, FLOAT8, read_header
from deltamux.errors import InvalidAdapterError

MAX_CONFIG_BYTES = 1 << 20
CONFIG_BOUNDS = Bounds(depth=16, values=100_000, entries=8192)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
READ_AS_FLOAT32 = (torch.float64, *FLOAT8.values())
"""Dtypes that PEFT, and so deltamux, loads into float32 parameters."""

INTEGERS = (torch.uint8, torch.int32, torch.int64)
"""Packed bits, and indices: an op has `packed` for the parameters that hold them, and refuses them anywhere else."""


@dataclass(frozen=True)
class Checkpoint:
    """An adapter as its files hold it.

    Attributes:
        config: the values of adapter_config.json; ``peft_type`` names the method.
        tensors: by name, as stored (PEFT prefixes names with ``base_model.model.``).
        metadata: the safetensors header's strings, such as ``base_fingerprint``.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Reads an adapter's directory.

        Raises:
            InvalidAdapterError: a file is missing, irregular, damaged, a pickle, or holds dtypes that no adapter has.
        """
        directory = Path(directory)
        config = read_config(_regular(directory / CONFIG_FILE))
        tensors, metadata = read_tensors(_regular(directory / TENSORS_FILE))
        return cls(config, tensors, metadata)

    def write(self, directory: str | Path) -> None:
        """Writes both files; the directory is made where needed."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(self.config), indent=2, sort_keys=True)
        (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.tensors.items()}
        save_file(tensors, directory / TENSORS_FILE, metadata={"format": "pt", **self.metadata})


class TrackedTensors(Mapping[str, Tensor]):
    """Tensors with a record of which were read: the others are a checkpoint's leftovers."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor = self._tensors[name]
        except KeyError:
            raise InvalidAdapterError(
                f"tensor {name!r} is missing from {TENSORS_FILE}", reason="MISSING_TENSOR", metadata={"tensor": name}
            ) from None
        self._read.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._tensors else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def leftovers(self) -> list[str]:
        """Returns the names of the tensors that were not read."""
        return sorted(set(self._tensors) - self._read)


def _regular(path: Path) -> Path:
    try:
        mode = path.stat().st_mode
    except OSError:
        raise InvalidAdapterError(
            missing(path.parent, path.name, "the adapter's directory"),
            reason="MISSING_FILE",
            metadata={"file": path.name},
        ) from None
    if not stat.S_ISREG(mode):
        raise InvalidAdapterError(f"{path.name} is not a regular file", metadata={"file": path.name})
    return path


def read_config(path: Path) -> dict[str, Any]:
    """Reads an adapter_config.json: an object of at most `MAX_CONFIG_BYTES` within `CONFIG_BOUNDS`, each key once.

    Raises:
        InvalidAdapterError: it is larger, damaged, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InvalidAdapterError(
            f"{CONFIG_FILE} cannot be read: {error.strerror}", metadata={"file": path.name}
        ) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise InvalidAdapterError(
            f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes", metadata={"file": path.name}
        )
    try:
        return parse_object(raw.removeprefix(codecs.BOM_UTF8), CONFIG_BOUNDS)
    except JSONRefusedError as error:
        metadata = {"file": path.name} | ({"field": error.entry} if error.entry else {})
        raise InvalidAdapterError(f"{CONFIG_FILE} is refused: {error}", metadata=metadata) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file: its tensors, and its header's strings. Its header is checked first.

    Raises:
        InvalidAdapterError: see `read_header` and `check_dtypes`.
    """
    header = read_header(path)
    for entry in header.tensors:
        _check_dtype(entry.name, {**DTYPES, **FLOAT8}.get(entry.dtype), entry.dtype)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {entry.name: as_read(file.get_tensor(entry.name)) for entry in header.tensors}
    except (OSError, SafetensorError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise InvalidAdapterError(
            f"{path.name} is damaged or not a safetensors file: {problem}", metadata={"file": path.name}
        ) from error
    return tensors, dict(header.metadata)


def as_read(tensor: Tensor) -> Tensor:
    """Returns a file's tensor as adapters hold it: float64 and float8 as float32."""
    return tensor.float() if tensor.dtype in READ_AS_FLOAT32 else tensor


def check_filled(tensors: Mapping[str, Tensor]) -> None:
    """Raises InvalidAdapterError where a file holds no values, as that of a sharded run that was not gathered."""
    # A matrix of rank 0 is what a method may leave of a module; a file of nothing else is not.
    empty = [name for name, tensor in tensors.items() if tuple(tensor.shape) == (0,)]
    if not any(tensor.numel() for tensor in tensors.values()):
        empty = list(tensors)
    if empty or not tensors:
        what = f"{empty[0][:MAX_NAME]!r} has no values" if empty else "the file holds no tensors"
        raise InvalidAdapterError(
            f"the adapter is empty: {what}. A run under ZeRO-3 or FSDP gathers its parameters before it saves them "
            "(DeepSpeed: stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py)",
            reason="EMPTY_ADAPTER",
            metadata={"tensor": empty[0][:MAX_NAME] if empty else ""},
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises InvalidAdapterError naming the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)
        if not finite.all():
            index = (~finite).nonzero()[0].tolist()
            raise InvalidAdapterError(
                f"tensor {name!r} holds {tensor[tuple(index)].item()} at {index}; adapters hold finite numbers only",
                reason="NOT_FINITE",
                metadata={"tensor": name, "index": str(index)},
            )


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Raises InvalidAdapterError naming the first tensor that does not hold floats."""
    for name, tensor in tensors.items():
        _check_dtype(name, tensor.dtype, str(tensor.dtype))


def _check_dtype(name: str, dtype: torch.dtype | None, shown: str) -> None:
    if dtype in FLOATS + INTEGERS + READ_AS_FLOAT32:
        return
    codes = dtype in (torch.int8, torch.int16)
    what = "integers are codes without the scale that they were quantised with" if codes else "it is not supported"
    raise InvalidAdapterError(
        f"tensor {name[:MAX_NAME]!r} has dtype {shown}: {what}; adapters hold float32, float16 or bfloat16 (and "
        "indices as int32 or int64, packed bits as uint8), so save it as one of these",
        metadata={"tensor": name[:MAX_NAME], "dtype": shown},
    )
