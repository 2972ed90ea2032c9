"""Turns other libraries' adapter directories into one that the server takes: AdapterHub's, and PEFT's with a pickle."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from deltamux.deltas import Checkpoint
from deltamux.deltas.checkpoint import CONFIG_FILE, TENSORS_FILE, check_dtypes, read_config, read_tensors
from deltamux.errors import FailedPreconditionError, InvalidAdapterError
from deltamux.registry import Registry
from deltamux_trainers.writing import replacing

SAFE_FILES = (TENSORS_FILE, "adapter.safetensors")
PICKLES = ("adapter_model.bin", "pytorch_adapter.bin")


def convert(source: Path, destination: Path) -> str:
    """Writes an adapter directory as adapter_config.json and adapter_model.safetensors; whole, or not at all.

    Returns:
        The name of the method that it is of.

    Raises:
        InvalidConfigError: an option cannot be served exactly; the metadata name it.
        InvalidAdapterError, UnknownMethodError: the files are no adapter, or a pickle holds more than tensors.
        FailedPreconditionError: the destination exists and is no empty directory.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FailedPreconditionError(f"{destination} is not empty: choose another destination", reason="OUTPUT_EXISTS")
    foreign = read_foreign(source)
    _check_filled(foreign)
    method, checkpoint = Registry().recognise(foreign)
    method.parse(checkpoint.config)
    with replacing(destination) as staging:
        checkpoint.write(staging)
    return method.name


def _check_filled(checkpoint: Checkpoint) -> None:
    """Raises InvalidAdapterError where the files hold no values, as those of a sharded run that was not gathered."""
    empty = [name for name, tensor in checkpoint.tensors.items() if tensor.numel() == 0]
    if empty or not checkpoint.tensors:
        what = f"{empty[0]} has no values" if empty else "the file holds no tensors"
        raise InvalidAdapterError(
            f"the adapter is empty: {what}. A run under ZeRO-3 or FSDP gathers its parameters before it saves them",
            reason="EMPTY_ADAPTER",
            metadata={"tensor": empty[0] if empty else ""},
        )


def read_foreign(directory: Path) -> Checkpoint:
    """Reads an adapter's directory as AdapterHub or PEFT wrote it.

    A pickle is read with `torch.load(weights_only=True)` alone, which runs no code that the file brings.
    """
    files = [directory / name for name in (*SAFE_FILES, *PICKLES)]
    path = next((path for path in files if path.is_file()), None)
    for file, found in ((directory / CONFIG_FILE, (directory / CONFIG_FILE).is_file()), (files[0], path is not None)):
        if not found:
            raise InvalidAdapterError(
                f"{directory} holds no {file.name}: an adapter is a directory with {CONFIG_FILE} and one of "
                f"{', '.join(f.name for f in files)}",
                reason="MISSING_FILE",
                metadata={"file": file.name},
            )
    assert path is not None
    config = read_config(directory / CONFIG_FILE)
    if path.name in PICKLES:
        return Checkpoint(config, read_pickle(path))
    return Checkpoint(config, *read_tensors(path))


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Reads a file of named tensors that torch.save wrote.

    Raises:
        InvalidAdapterError: it is damaged, or holds anything but named tensors of floats.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        problem = str(error).partition("\n")[0]
        raise InvalidAdapterError(
            f"{path.name} is damaged, or a pickle of more than tensors, which is not read: {problem}",
            reason="PICKLE",
            metadata={"file": path.name},
        ) from error
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise InvalidAdapterError(
            f"{path.name} holds something else than named tensors", reason="PICKLE", metadata={"file": path.name}
        )
    tensors = {str(name): tensor for name, tensor in values.items()}
    check_dtypes(tensors)
    return tensors
