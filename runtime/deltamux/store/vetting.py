"""Whether a database can be used for the objects that it lies beside; looking changes nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from deltamux.errors import FailedPreconditionError
from deltamux.store import schema
from deltamux.store.identity import Identity, check_belongs, mismatch, no_database

DATABASE_FILE = "db.sqlite3"


def check_present(root: Path, files: Identity | None, *, claimed: bool) -> None:
    """Raises FailedPreconditionError where there should be a database and is none.

    Args:
        files: the identity in the files beside it, if there is any.
        claimed: whether anything else of a store is there.
    """
    path = root / DATABASE_FILE
    if claimed and (not path.exists() or path.stat().st_size == 0):
        raise no_database(root, files, "empty" if path.exists() else "missing")


def vet(
    connection: sqlite3.Connection, root: Path, files: Identity | None, *, claimed: bool, adopt: bool = False
) -> int:
    """Returns the version of a database's schema, 0 of an empty one.

    Args:
        files, claimed: see `check_present`.
        adopt: whether it may belong to something else.
    Raises:
        FailedPreconditionError: it is newer, empty, of something else, or older than the objects.
        sqlite3.DatabaseError: it is damaged.
    """

    def first(sql: str) -> tuple[object, ...] | None:
        row: tuple[object, ...] | None = connection.execute(sql).fetchone()
        return row

    if (found := first("PRAGMA quick_check(1)")) is None or found[0] != "ok":
        raise damage(root, str(found))
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version < 0:
        raise damage(root, f"it has schema {version}")
    if version > schema.SCHEMA_VERSION:
        raise FailedPreconditionError(
            f"{root / DATABASE_FILE} has schema {version}, and this deltamux knows {schema.SCHEMA_VERSION}: start the "
            "one that wrote it",
            reason="STORE_SCHEMA",
        )
    if version == 0 and first("SELECT 1 FROM sqlite_master"):
        raise mismatch(root, f"{root / DATABASE_FILE} is a database, but not of deltamux")
    if version == 0 and claimed:
        raise no_database(root, files, "empty")
    if version == 1 and files is not None:
        raise mismatch(root, f"{root / DATABASE_FILE} is an older copy, of schema 1", "STORE_OUTDATED")
    if version == schema.SCHEMA_VERSION:
        if lacking := schema.missing(connection):
            raise damage(root, f"it lacks {', '.join(lacking)}")
        if foreign := schema.foreign(connection):
            raise damage(root, f"it holds {', '.join(foreign)}, which this program does not make")
        if not adopt:
            check_belongs(root, files, identity_in(connection))
    return version


def identity_in(connection: sqlite3.Connection) -> Identity:
    """Returns what a database says of itself; raises sqlite3.DatabaseError where that is not one row of its types."""
    rows = connection.execute("SELECT store_id, generation, base_fingerprint FROM identity").fetchall()
    if [list(map(type, row)) for row in rows] != [[str, int, str]]:
        raise _corrupt("its table `identity` does not hold one row of its types")
    return Identity(*rows[0])


def damage(root: Path, problem: str) -> sqlite3.DatabaseError:
    """Returns what SQLite would raise if it had found a problem itself."""
    return _corrupt(f"{root / DATABASE_FILE}: {problem}")


def _corrupt(problem: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(problem)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error
