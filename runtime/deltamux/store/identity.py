"""Which database belongs to which objects: a store's id and generation, kept in files beside the database and in it.

The files are ``store.json`` (written anew when another base is served) and ``generation`` (overwritten in place after
every change). A power cut may leave the generation's file behind the database; a database behind the file is an older
copy, and lacks what was acknowledged since.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from deltamux.errors import FailedPreconditionError
from deltamux.store.objects import open_regular

IDENTITY_FILE = "store.json"
GENERATION_FILE = "generation"
FORMAT = "deltamux.store/2"
DIGITS = 20
MAX_BYTES = 4096
"""Of either file; longer ones are cut, and so are damaged."""


class Identity(NamedTuple):
    """A store's id, random, how many changes it has seen, and the base that it was served on last ("": unknown)."""

    store_id: str
    generation: int
    base_fingerprint: str = ""

    def __str__(self) -> str:
        return f"{self.store_id[:8]}, generation {self.generation}"


class IdentityFiles:
    """What of the identity lies beside the database."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._generation: int | None = None

    def read(self) -> Identity | None:
        """Returns what the files say; None where there is no ``store.json``.

        Raises:
            FailedPreconditionError: ``store.json`` is damaged, or of a newer format.
        """
        path = self._root / IDENTITY_FILE
        try:
            said = json.loads(_text(path))
            if said["format"] != FORMAT:
                raise FailedPreconditionError(
                    f"{path} has format {said['format']!r}, and this deltamux knows {FORMAT!r}: start the one that "
                    "wrote it",
                    reason="STORE_SCHEMA",
                )
            return Identity(str(said["store_id"]), self._read_generation(), str(said["base_fingerprint"]))
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise FailedPreconditionError(
                f"{path} is damaged: restore a backup with `deltamux store restore BACKUP {self._root}`, or accept the "
                f"database that is here with `deltamux store check {self._root} --adopt`",
                reason="STORE_CORRUPT",
            ) from error

    def write(self, identity: Identity) -> None:
        """Writes both files, durably."""
        path, fresh = self._root / IDENTITY_FILE, self._root / f"{IDENTITY_FILE}.new"
        said = {"format": FORMAT, "store_id": identity.store_id, "base_fingerprint": identity.base_fingerprint}
        text = json.dumps(said) + "\n"
        self.note(identity.generation)
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        directory = os.open(self._root, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def note(self, generation: int) -> None:
        """Overwrites the generation, in place and without waiting for the disk; one that cannot be written lags."""
        with suppress(OSError):
            if self._generation is None:
                self._generation = os.open(self._root / GENERATION_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            os.pwrite(self._generation, f"{generation:0{DIGITS}}\n".encode(), 0)

    def close(self) -> None:
        if self._generation is not None:
            os.close(self._generation)
            self._generation = None

    def _read_generation(self) -> int:
        try:
            return int(_text(self._root / GENERATION_FILE))
        except (OSError, ValueError):
            return 0  # behind any database, as after a power cut


def _text(path: Path) -> str:
    """Returns a small file's text; raises OSError, also for what is not a regular file, and ValueError."""
    with open_regular(path) as file:
        return file.read(MAX_BYTES).decode("utf-8")


def check_belongs(root: Path, files: Identity | None, database: Identity) -> None:
    """Raises FailedPreconditionError unless a database belongs to the directory that it lies in."""
    if files is None:
        if database.generation:
            raise mismatch(root, f"the database is of store {database}, and {IDENTITY_FILE} beside it is missing")
    elif files.store_id != database.store_id:
        raise mismatch(root, f"the database is of store {database}, but the objects are of store {files}")
    elif database.generation < files.generation:
        raise mismatch(
            root,
            f"the database is an older copy: it is of generation {database.generation}, and the objects of generation "
            f"{files.generation}, so that versions which were acknowledged are missing from it",
            "STORE_OUTDATED",
        )


def no_database(root: Path, files: Identity | None, state: str) -> FailedPreconditionError:
    """Returns the error of a store whose database is missing or empty."""
    whose = f" of store {files}" if files else ""
    return mismatch(root, f"the database {root / 'db.sqlite3'} is {state}, and there are objects{whose} beside it")


def mismatch(root: Path, problem: str, reason: str = "STORE_MISMATCH") -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{problem}. Nothing was changed. Put the right database back, or restore a backup with `deltamux store "
        f"restore BACKUP {root}`; or give up what the database does not know with `deltamux store check {root} "
        "--adopt`",
        reason=reason,
        metadata={"store": str(root)},
    )
