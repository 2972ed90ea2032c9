"""A store's identity: its id and generation, in the database and in files, which match a database to objects.

The files are ``store.json`` (rewritten when another base is served) and ``generation`` (overwritten in place after
every change). After a power cut the file's generation may be lower than the database's; a database with a lower
generation than the file is an older copy, without the changes acknowledged since.
"""

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
"""Longest read of either file; longer ones count as damaged."""


class Identity(NamedTuple):
    """A store's random id, its number of changes, and the fingerprint of the last served base ("": unknown)."""

    store_id: str
    generation: int
    base_fingerprint: str = ""

    def __str__(self) -> str:
        return f"{self.store_id[:8]}, generation {self.generation}"


class IdentityFiles:
    """The files of the identity."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._generation: int | None = None

    def read(self) -> Identity | None:
        """Returns the identity in the files; None if there is no ``store.json``.

        Raises:
            FailedPreconditionError: ``store.json`` is damaged, or of a newer format.
        """
        path = self._root / IDENTITY_FILE
        try:
            fields = json.loads(_text(path))
            if fields["format"] != FORMAT:
                raise FailedPreconditionError(
                    f"{path} has format {fields['format']!r}, and this deltamux has {FORMAT!r}: start the one that "
                    "wrote it",
                    reason="STORE_SCHEMA",
                )
            return Identity(str(fields["store_id"]), self._read_generation(), str(fields["base_fingerprint"]))
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
        fields = {"format": FORMAT, "store_id": identity.store_id, "base_fingerprint": identity.base_fingerprint}
        text = json.dumps(fields) + "\n"
        self.write_generation(identity.generation)
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

    def write_generation(self, generation: int) -> None:
        """Overwrites the generation in place, without fsync; an error leaves the former one."""
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
            return 0  # lower than any database's, as after a power cut


def _text(path: Path) -> str:
    """Returns a small file's text; raises OSError, also for what is not a regular file, and ValueError."""
    with open_regular(path) as file:
        return file.read(MAX_BYTES).decode("utf-8")


def check_belongs(root: Path, files: Identity | None, database: Identity) -> None:
    """Raises FailedPreconditionError unless a database belongs to its directory."""
    if files is None:
        if database.generation:
            raise mismatch(root, f"the database is of store {database}, and {IDENTITY_FILE} next to it is missing")
    elif files.store_id != database.store_id:
        raise mismatch(root, f"the database is of store {database}, but the objects are of store {files}")
    elif database.generation < files.generation:
        raise mismatch(
            root,
            f"the database is an older copy: it is of generation {database.generation}, and the objects of generation "
            f"{files.generation}, so acknowledged versions are missing from it",
            "STORE_OUTDATED",
        )


def no_database(root: Path, files: Identity | None, state: str) -> FailedPreconditionError:
    """Returns the error of a store whose database is missing or empty."""
    whose = f" of store {files}" if files else ""
    return mismatch(root, f"the database {root / 'db.sqlite3'} is {state}, and there are objects{whose} next to it")


def mismatch(root: Path, problem: str, reason: str = "STORE_MISMATCH") -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{problem}. Nothing was changed. Put the right database back, or restore a backup with `deltamux store "
        f"restore BACKUP {root}`; or drop the versions that the database lacks with `deltamux store check {root} "
        "--adopt`",
        reason=reason,
        metadata={"store": str(root)},
    )
