"""Content-addressed files: written beside, made durable, renamed into place; an object is whole or not there."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAM_FILE = "program.safetensors"
IDENTITY_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files whose content makes a version's digest; a changed README makes no new version."""


class ObjectStore:
    """Directories named by digest, under ``objects/``; and staging directories, under ``staging/``."""

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._staging = root / "staging"

    def prepare(self) -> None:
        """Makes the directories, and clears the staging directory of what uploads have left that a crash ended."""
        self._objects.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(exist_ok=True)

    def path(self, digest: str) -> Path:
        return self._objects / digest[:2] / digest

    def program(self, digest: str) -> Path:
        return self.path(digest) / PROGRAM_FILE

    def program_sum(self, digest: str) -> str | None:
        """Returns the sha256 of a compiled program's file; None where there is none."""
        try:
            return file_sum(self.program(digest))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def upload_is_whole(self, digest: str) -> bool:
        """Reads an object's uploaded files; tells whether they are those that its digest names."""
        try:
            return content_digest(self.path(digest)) == digest
        except OSError:
            return False

    def digests(self) -> Iterator[str]:
        """Yields the digests of all objects."""
        for directory in self._objects.glob("*/*"):
            yield directory.name

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yields an empty directory, which is gone after the block unless `put` has taken it."""
        directory = self._staging / secrets.token_hex(16)
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def put(self, staged: Path, digest: str, *, keep_program: bool = False) -> None:
        """Moves a staging directory into place, durably.

        Of an object that is there already, the program is replaced unless it is to be kept, and any uploaded file that
        is damaged; each file by one rename, so that a reader finds the old one or the new one, whole.
        """
        for file in staged.iterdir():
            _sync(file)
        _sync(staged)
        target = self.path(digest)
        if not target.is_dir():
            target.parent.mkdir(exist_ok=True)
            _sync(self._objects)
            staged.rename(target)
            _sync(target.parent)
            return
        kept = {PROGRAM_FILE} if keep_program else set()
        if self.upload_is_whole(digest):
            kept.update(IDENTITY_FILES)
        for file in staged.iterdir():
            if file.name not in kept:
                file.replace(target / file.name)
        _sync(target)

    def remove(self, digest: str) -> bool:
        """Removes an object, as a whole; returns whether it is gone."""
        path, aside = self.path(digest), self._staging / secrets.token_hex(16)
        with suppress(OSError):  # a full disk may refuse the rename, and then the files go where they are
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
        return not path.exists()


def content_digest(directory: Path) -> str:
    """Returns the sha256 over the names and contents of an adapter's identity files, in hex."""
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        digest.update(f"{name}\0{file_sum(directory / name)}\n".encode())
    return digest.hexdigest()


def file_sum(path: Path) -> str:
    """Returns a file's sha256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
