"""Faults of disks, for real: full ones, which are small file systems in memory, and files that are damaged."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(directory: Path, mebibytes: int = 12) -> Iterator[Path]:
    """Mounts a file system of a few mebibytes at a new directory; skips the test where that is not permitted."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Fills a disk but for `leave` bytes (a multiple of 4096); returns the file that does."""
    filler, room = disk / "filler", disk / "room"
    room.write_bytes(bytes(leave))
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    room.unlink()
    return filler


def flip(path: Path) -> None:
    """Flips a bit near a file's end, which of a safetensors file is in a tensor."""
    data = bytearray(path.read_bytes())
    data[max(0, len(data) - 5)] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
