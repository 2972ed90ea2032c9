"""Content-addressed files: written beside, made durable, renamed into place; an object is whole or not there."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM_FILE = "program.safetensors"
IDENTITY_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files whose content makes a version's digest; a changed README makes no new version."""


class ObjectStore:
    """Directories named by digest, under ``objects/``; and staging directories, under ``staging/``."""

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._staging = root / "staging"
        self._objects.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self._objects / digest[:2] / digest

    def program(self, digest: str) -> Path:
        return self.path(digest) / PROGRAM_FILE

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yields an empty directory, which is gone after the block unless `put` has taken it."""
        directory = self._staging / secrets.token_hex(16)
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def put(self, directory: Path, digest: str) -> None:
        """Moves a staging directory into place, durably; an object that is there already stays as it is."""
        target = self.path(digest)
        if target.is_dir():
            return
        for file in directory.iterdir():
            _sync(file)
        _sync(directory)
        target.parent.mkdir(exist_ok=True)
        _sync(self._objects)
        directory.rename(target)
        _sync(target.parent)

    def remove(self, digest: str) -> None:
        """Removes an object; half-removed after a crash, it counts as unreferenced and goes when the store opens."""
        shutil.rmtree(self.path(digest), ignore_errors=True)

    def clean(self, referenced: Iterable[str]) -> None:
        """Removes what a crash left behind: staging directories, and objects that no version refers to."""
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        wanted = set(referenced)
        for directory in self._objects.glob("*/*"):
            if directory.name not in wanted:
                shutil.rmtree(directory, ignore_errors=True)


def content_digest(directory: Path) -> str:
    """Returns the sha256 over the names and contents of an adapter's identity files, in hex."""
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        with (directory / name).open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
