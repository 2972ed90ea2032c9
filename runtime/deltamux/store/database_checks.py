"""Read-only checks of a database before it is used with a store's objects."""

import sqlite3
from pathlib import Path

from deltamux.errors import FailedPreconditionError
from deltamux.store import schema
from deltamux.store.identity import Identity, check_belongs, mismatch, no_database

DATABASE_FILE = "db.sqlite3"


def check_present(root: Path, files: Identity | None, *, claimed: bool) -> None:
    """Raises FailedPreconditionError if the database of an existing store is missing.

    Args:
        files: the identity in the store's files, if there is any.
        claimed: whether other parts of a store exist.
    """
    path = root / DATABASE_FILE
    if claimed and (not path.exists() or path.stat().st_size == 0):
        raise no_database(root, files, "empty" if path.exists() else "missing")


def check_database(
    connection: sqlite3.Connection, root: Path, files: Identity | None, *, claimed: bool, adopt: bool = False
) -> int:
    """Returns the version of a database's schema; 0 for an empty one.

    Args:
        files, claimed: see `check_present`.
        adopt: whether it may belong to another store.
    Raises:
        FailedPreconditionError: it is newer, empty, of another store or program, or older than the objects.
        sqlite3.DatabaseError: it is damaged.
    """
    version = _schema_version(connection, root)
    if version == 0 and connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise mismatch(root, f"{root / DATABASE_FILE} is a database, but not of deltamux")
    if version == 0 and claimed:
        raise no_database(root, files, "empty")
    if version == 1 and files is not None:
        raise mismatch(root, f"{root / DATABASE_FILE} is an older copy, of schema 1", "STORE_OUTDATED")
    if version == schema.SCHEMA_VERSION:
        if lacking := schema.missing(connection):
            raise damage(root, f"it lacks {', '.join(lacking)}")
        if unexpected := schema.unexpected(connection):
            raise damage(root, f"it has {', '.join(unexpected)}, which deltamux does not create")
        if not adopt:
            check_belongs(root, files, identity_in(connection))
    return version


def _schema_version(connection: sqlite3.Connection, root: Path) -> int:
    found: tuple[object, ...] | None = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found is None or found[0] != "ok":
        raise damage(root, str(found))
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version < 0:
        raise damage(root, f"it has schema {version}")
    if version > schema.SCHEMA_VERSION:
        raise FailedPreconditionError(
            f"{root / DATABASE_FILE} has schema {version}, and this deltamux has {schema.SCHEMA_VERSION}: start the "
            "one that wrote it",
            reason="STORE_SCHEMA",
        )
    return version


def identity_in(connection: sqlite3.Connection) -> Identity:
    """Returns a database's identity; raises sqlite3.DatabaseError if it is not one valid row."""
    rows = connection.execute("SELECT store_id, generation, base_fingerprint FROM identity").fetchall()
    if [list(map(type, row)) for row in rows] != [[str, int, str]]:
        raise _corrupt("its table `identity` does not have one valid row")
    return Identity(*rows[0])


def damage(root: Path, problem: str) -> sqlite3.DatabaseError:
    """Returns the error that SQLite raises for a damaged database."""
    return _corrupt(f"{root / DATABASE_FILE}: {problem}")


def _corrupt(problem: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(problem)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error
