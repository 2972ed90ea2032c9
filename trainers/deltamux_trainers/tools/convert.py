"""Conversion of other libraries' adapter directories into one that can be uploaded.

These are AdapterHub's, MLX-LM's, PEFT's with a pickle, and state dicts of PEFT's models that were not saved by PEFT.
Their tensors get the names of PEFT's files.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamux.adapter_files import missing
from deltamux.deltas import BaseModel, Checkpoint
from deltamux.deltas.base_model import read_base_config
from deltamux.deltas.checkpoint import (
    CONFIG_FILE,
    TENSORS_FILE,
    as_read,
    check_dtypes,
    check_filled,
    check_finite,
    read_config,
    read_tensors,
)
from deltamux.deltas.tensor_names import PREFIX, SHARED, parse, read_names, unwrapped
from deltamux.errors import FailedPreconditionError, InvalidAdapterError
from deltamux.registry import Registry
from deltamux_plugins.targets import by_pattern, matches
from deltamux_trainers.output_dir import atomic_output

SAFE_FILES = (TENSORS_FILE, "adapter.safetensors", "adapters.safetensors")
PICKLES = ("adapter_model.bin", "pytorch_adapter.bin")

Note = Callable[[str], None]
"""Called with a sentence on the parts that were removed from the tensors' names."""


def _silent(note: str) -> None:
    pass


def convert(
    source: Path, destination: Path, *, adapter_name: str = "", model: str | Path = "", note: Note = _silent
) -> str:
    """Writes an adapter as adapter_config.json and adapter_model.safetensors, whole or not at all.

    Args:
        adapter_name: the adapter to convert, where the tensors' names hold several.
        model: directory or Hugging Face id of the base, whose modules' paths the tensors' names are matched to; ""
            keeps the paths as they are, less ``language_model`` at the start and ``linear`` at the end.
        note: called with what was removed from the names.

    Returns:
        The name of the adapter's method.

    Raises:
        InvalidConfigError: an option cannot be served exactly; the metadata has its name.
        InvalidAdapterError, UnknownMethodError: the files are not an adapter, a pickle holds more than tensors, or the
            tensors are those of several adapters and `adapter_name` is none of them.
        FailedPreconditionError: the destination exists and is not an empty directory.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FailedPreconditionError(f"{destination} is not empty: choose another destination", reason="OUTPUT_EXISTS")
    foreign = read_foreign(source)
    check_filled(foreign.tensors)
    check_finite(foreign.tensors)
    method, checkpoint = Registry().recognise(foreign)
    method.parse(checkpoint.config)
    if "peft_type" in foreign.config:
        checkpoint = foreign
    if method.info.in_peft:
        _check_floats(checkpoint.tensors)
        checkpoint = renamed(checkpoint, adapter_name, _paths(model), note)
    with atomic_output(destination) as staging:
        checkpoint.write(staging)
    return method.name


def _check_floats(tensors: Mapping[str, Tensor]) -> None:
    """Raises InvalidAdapterError where a tensor holds integers, unless it holds indices by its name."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and "indices" not in name:
            raise InvalidAdapterError(
                f"tensor {name[:200]!r} holds integers ({tensor.dtype}), and it is a parameter: save it as floats",
                metadata={"tensor": name[:200]},
            )


def renamed(
    checkpoint: Checkpoint, adapter_name: str, paths: Collection[str] | None, note: Note = _silent
) -> Checkpoint:
    """Returns a checkpoint with the tensors' names of PEFT's files.

    Raises:
        InvalidAdapterError: the names are those of several adapters, or two become one.
    """
    reading = read_names(checkpoint.tensors, paths, adapter_name)
    _check_adapter(reading.adapters, adapter_name)
    tensors: dict[str, Tensor] = {}
    for name, own in reading.names.items():
        if own in tensors:
            raise InvalidAdapterError(
                f"two tensors of the file are both {own[:200]!r} once their names are PEFT's, {name[:200]!r} among "
                "them: keep one",
                reason="AMBIGUOUS_TENSOR",
                metadata={"tensor": name},
            )
        tensors[own] = checkpoint.tensors[name]
    config = dict(checkpoint.config)
    if reading.marks:
        note(f"removed from the tensors' names: {', '.join(reading.marks)}")
        if config.get("target_modules") is not None:
            parameters = config.get("target_parameters") or []
            config["target_modules"] = _targets(config["target_modules"], list(tensors), parameters)
        config |= _patterns(config, reading.names)
    return Checkpoint(config, tensors, checkpoint.metadata)


def _check_adapter(found: tuple[str, ...], chosen: str) -> None:
    named = [name for name in found if name]
    is_open = len(found) > 1 and not chosen
    if is_open or (chosen and chosen not in named):
        known = ", ".join(name[:60] for name in named[:8]) or "none"
        problem = f"the tensors' names hold several adapters ({known})" if is_open else f"no tensor is of {chosen!r}"
        raise InvalidAdapterError(
            f"{problem}: choose one of {known} with --adapter-name",
            reason="AMBIGUOUS_ADAPTER",
            metadata={"adapters": ",".join(named)},
        )


def _targets(targets: Any, names: list[str], parameters: list[str]) -> Any:
    """Returns target_modules as they are where they match every module of the file, else the modules' paths.

    Args:
        parameters: target_parameters, whose modules are none of target_modules.
    """
    read = [parsed for name in names if (parsed := parse(name)) is not None and parsed.tail and parsed.path != SHARED]
    modules = sorted({".".join(parsed.path) for parsed in read if not _holds_target(parsed.path, parameters)})
    if not modules or targets == "all-linear":
        return targets
    listed = tuple(targets) if isinstance(targets, list) else targets
    return targets if all(matches(listed, module) for module in modules) else modules


def _holds_target(path: tuple[str, ...], parameters: list[str]) -> bool:
    """Returns whether a module holds one of target_parameters."""
    fields = {parameter.rpartition(".")[2] for parameter in parameters}
    return any(matches(tuple(parameters), ".".join((*unwrapped(path), field))) for field in fields)


def _patterns(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the ``*_pattern`` options by the modules' new paths, where the patterns do not match these.

    Args:
        names: the tensors' names in PEFT's files, by those of the source.
    """
    modules: dict[str, tuple[str, ...]] = {}
    for name, own in names.items():
        read, new = parse(name), parse(own)
        if read is not None and new is not None and new.tail:
            end = len(read.tail) + bool(read.adapter)
            whole = ".".join(name.split(".")[:-end]).removeprefix(PREFIX)
            modules.setdefault(".".join(new.path), (whole, ".".join(read.path)))
    found: dict[str, Any] = {}
    for key, values in config.items():
        if not key.endswith("_pattern") or not isinstance(values, dict) or not values:
            continue
        meant = {
            path: next((v for place in (*places, path) if (v := by_pattern(values, place)) is not None), None)
            for path, places in modules.items()
        }
        if any(by_pattern(values, path) != value for path, value in meant.items()):
            found[key] = {path: value for path, value in meant.items() if value is not None}
            if config.get("target_parameters"):  # whose patterns stay, behind a value for every module
                default = config.get({"rank_pattern": "r", "alpha_pattern": "lora_alpha"}.get(key, key))
                found[key] = {**{p: default if v is None else v for p, v in meant.items()}, **values}
    return found


def _paths(model: str | Path) -> set[str] | None:
    """Returns the paths of a base's modules; None where no base is given."""
    if not model:
        return None
    return BaseModel.from_config(read_base_config(model)).paths()


def read_foreign(directory: Path) -> Checkpoint:
    """Reads an adapter's directory of AdapterHub or PEFT.

    A pickle is read only with `torch.load(weights_only=True)`, which runs no code of the file.
    """
    files = [directory / name for name in (*SAFE_FILES, *PICKLES)]
    path = next((path for path in files if path.is_file()), None)
    for file, found in ((directory / CONFIG_FILE, (directory / CONFIG_FILE).is_file()), (files[0], path is not None)):
        if not found:
            raise InvalidAdapterError(
                f"{missing(directory, file.name)}; read are {', '.join(f.name for f in files)}",
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
        InvalidAdapterError: it is damaged, or holds anything but named, dense tensors of floats.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise any error
        problem = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise InvalidAdapterError(
            f"{path.name} is damaged, or a pickle of more than tensors, which is not read: {problem}",
            reason="PICKLE",
            metadata={"file": path.name},
        ) from error
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) and _is_plain(v) for v in values.values()):
        raise InvalidAdapterError(
            f"{path.name} holds something other than named, dense tensors with values",
            reason="PICKLE",
            metadata={"file": path.name},
        )
    tensors = {str(name): tensor for name, tensor in values.items()}
    check_dtypes(tensors)
    return {name: as_read(tensor) for name, tensor in tensors.items()}


def _is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is dense with values: not sparse, not nested, not on the meta device."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
