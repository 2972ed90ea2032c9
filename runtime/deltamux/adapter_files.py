"""The names of the files in an adapter's directory, and the message for a directory that lacks one."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
REQUIRED_FILES = (CONFIG_FILE, TENSORS_FILE)
FOREIGN_FILES = ("adapter_model.bin", "adapter.safetensors", "pytorch_adapter.bin", "adapters.safetensors")
"""Of PEFT before safetensors, AdapterHub and MLX-LM: `deltamux convert` reads them."""

MAX_ENTRIES = 500
"""How many entries of a directory are looked at for a message."""

SHOWN = 3


def missing(directory: Path, name: str, shown: str = "") -> str:
    """Returns a sentence about a directory that lacks one of an adapter's files, and what to do.

    Args:
        shown: what the sentence calls the directory; "" for its path.
    """
    shown, path = shown or str(directory), "ADAPTER" if shown else directory
    problem = f"{shown} has no {name}; an adapter is a directory with {CONFIG_FILE} and {TENSORS_FILE}"
    found = [path.name for path in _entries(directory)]
    if name == CONFIG_FILE and (nested := [str(path.relative_to(directory)) for path in _nested(directory)]):
        more = f" and {len(nested) - SHOWN} more" if len(nested) > SHOWN else ""
        return f"{problem}. Give one of the folders in it that hold one: {', '.join(nested[:SHOWN])}{more}"
    if foreign := next((file for file in FOREIGN_FILES if file in found), ""):
        return f"{problem}. It holds {foreign}: run `deltamux convert {path} NEW`, and use NEW"
    if "zero_to_fp32.py" in found or any(file.startswith("global_step") for file in found):
        return f"{problem}. It is a sharded checkpoint of DeepSpeed: gather it with its zero_to_fp32.py first"
    if "config.json" in found and CONFIG_FILE not in found:
        return f"{problem}. It holds a whole model, which is served by itself: `deltamux serve --model {path}`"
    return problem


def _entries(directory: Path) -> Iterator[Path]:
    try:
        yield from islice(directory.iterdir(), MAX_ENTRIES)
    except OSError:
        return


def _nested(directory: Path) -> list[Path]:
    """Returns the folders, and theirs, that hold an adapter's config."""
    folders = sorted(path for path in _entries(directory) if path.is_dir())
    deeper = (path for folder in folders for path in _entries(folder))
    candidates = [*folders, *islice(deeper, MAX_ENTRIES)]
    return [path for path in candidates if (path / CONFIG_FILE).is_file()]
