"""Damage to files: such as no header, no shape and no check of values would notice, and such as any reader does."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path) -> None:
    """Flips a bit near a file's end, which of a safetensors file is in a tensor."""
    data = bytearray(path.read_bytes())
    data[max(0, len(data) - 5)] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
