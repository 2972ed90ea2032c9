"""What the benchmarks' commands share: options, the name of the machine, and the JSON that they write."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path


def command(module: str, about: str | None, sizes: Iterable[str], size: str) -> argparse.ArgumentParser:
    """Returns the parser of ``python -m MODULE``, with --size of a random base and --output."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(about or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(sizes), default=size, help="of the random base")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser


def machine() -> str:
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def write_output(file: Path | None, content: object) -> None:
    """Writes JSON, where a file is given."""
    if file is not None:
        file.write_text(json.dumps(content, indent=2) + "\n")
