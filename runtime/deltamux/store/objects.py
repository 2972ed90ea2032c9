"""Content-addressed files: staged, synced and renamed into place, so that an object is never partial."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from deltamux.adapter_files import REQUIRED_FILES
from deltamux.store.faults import gone_error

PROGRAM_FILE = "program.safetensors"
IDENTITY_FILES = REQUIRED_FILES
"""The files whose content makes a version's digest; a changed README makes no new version."""

MAX_HEADER_BYTES = 64 << 20
_DIGEST = re.compile("[0-9a-f]{64}")


def is_digest(value: object) -> bool:
    """Whether a value is a sha256 in hex, as it names an object."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


class ObjectStore:
    """Directories named by digest, under ``objects/``; and staging directories, under ``staging/``."""

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._staging = root / "staging"

    def prepare(self) -> None:
        """Creates the directories, and empties the staging directory, as after a crash."""
        self._objects.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(exist_ok=True)

    def path(self, digest: str) -> Path:
        """Returns an object's directory; for an invalid digest one that does not exist, inside the store."""
        return self._objects / digest[:2] / digest if is_digest(digest) else self._objects / "none" / "none"

    def program(self, digest: str) -> Path:
        return self.path(digest) / PROGRAM_FILE

    def program_sum(self, digest: str) -> str | None:
        """Returns the sha256 of a compiled program's file; None if there is none, "" if it is unreadable."""
        try:
            return file_sum(self.program(digest))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return ""

    def program_virtual_tokens(self, digest: str) -> int | None:
        """Returns the number of virtual tokens in a compiled program's metadata; None if it cannot be read."""
        try:
            with open_regular(self.program(digest)) as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length)) if length <= MAX_HEADER_BYTES else {}
            return int(header["__metadata__"]["num_virtual_tokens"])
        except (OSError, struct.error, ValueError, LookupError, TypeError, RecursionError):
            return None

    def upload_is_whole(self, digest: str) -> bool:
        """Reads an object's uploaded files; returns whether they match its digest."""
        try:
            return content_digest(self.path(digest)) == digest
        except OSError:
            return False

    def digests(self) -> Iterator[str]:
        """Yields the digests of all objects."""
        for directory in self._objects.glob("*/*"):
            if is_digest(directory.name):
                yield directory.name

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yields an empty directory, which is removed after the block unless `put` has moved it.

        Raises:
            UnavailableError: the store was moved or removed (STORE_GONE).
        """
        directory = self._staging / secrets.token_hex(16)
        try:
            self._staging.mkdir(exist_ok=True)
            directory.mkdir()
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            raise gone_error(self._staging.parent) from error
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def put(self, staged: Path, digest: str, *, keep_program: bool = False) -> None:
        """Moves a staging directory into place, durably.

        Of an existing object, the program is replaced unless it is to be kept, and damaged uploaded files; each file by
        one rename, so that a reader never sees a partial one.
        """
        for file in staged.iterdir():
            _sync(file)
        _sync(staged)
        target = self.path(digest)
        if not target.is_dir():
            _clear_for_directory(target.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            _clear_for_directory(target)
            _sync(self._objects)
            staged.rename(target)
            _sync(target.parent)
            return
        kept = {PROGRAM_FILE} if keep_program else set()
        if self.upload_is_whole(digest):
            kept.update(IDENTITY_FILES)
        for file in staged.iterdir():
            if file.name not in kept:
                if (target / file.name).is_dir():
                    shutil.rmtree(target / file.name)
                file.replace(target / file.name)
        _sync(target)

    def remove(self, digest: str) -> bool:
        """Removes an object; returns whether it is removed completely."""
        path, aside = self.path(digest), self._staging / secrets.token_hex(16)
        with suppress(OSError):  # on a full disk the rename may fail; the files are removed in place
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
    """Returns a file's sha256, in hex; raises OSError, also for what is not a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading; raises OSError for any other, such as a pipe, which may block."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def _clear_for_directory(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
