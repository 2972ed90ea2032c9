"""`deltamux store backup` and `restore`: a checked copy of a store that may be in use."""

import hashlib
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO, NamedTuple

from deltamux.errors import FailedPreconditionError, ResourceExhaustedError
from deltamux.store.database_checks import DATABASE_FILE, identity_in
from deltamux.store.faults import FULL, READ_ONLY, store_error, store_faults
from deltamux.store.identity import GENERATION_FILE, IDENTITY_FILE, IdentityFiles
from deltamux.store.inspection import ATTEMPTS, Progress, Report, Snapshot, inspect, no_progress, open_read_only
from deltamux.store.lock import Lock, lock_directory, lock_store
from deltamux.store.objects import PROGRAM_FILE, ObjectStore, is_digest, open_regular
from deltamux.store.rows import prepare

ADMIN_KEY = "admin.key"
RESTORING = ".restoring-"
PARTS = (DATABASE_FILE, f"{DATABASE_FILE}-wal", f"{DATABASE_FILE}-shm", IDENTITY_FILE, GENERATION_FILE, "objects")


class Restored(NamedTuple):
    """The result of a restore.

    Attributes:
        report: the restored store's.
        replaced: the directory of the former store's files; None if there were none.
    """

    report: Report
    replaced: Path | None


def backup(root: Path, target: Path, progress: Progress = no_progress) -> Report:
    """Copies a store, which may be in use, to a new directory, renamed into place when it is complete.

    The copy is the store at one moment: the database is copied first, and again if an object that it refers to has
    changed or was removed since.

    Args:
        progress: called with the progress.
    Raises:
        FailedPreconditionError: there is no usable store, or the target is not empty (BACKUP_EXISTS).
    """
    partial = target.parent / f".{target.name[:200]}.{secrets.token_hex(4)}"
    with store_faults(target.parent, opening=True):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FailedPreconditionError(
                f"{target} exists already: give a new or an empty directory", reason="BACKUP_EXISTS"
            )
        _remove_interrupted(target)
        partial.mkdir(parents=True)
        lock = Lock()
        try:
            lock_directory(lock, partial)
            _copy_store(root, partial, target, progress)
            report = inspect(partial)
            os.sync()
            if target.exists():
                target.rmdir()
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.close()
    return report


def _copy_store(root: Path, partial: Path, target: Path, progress: Progress) -> None:
    with open_read_only(root) as connection, _faults_of_target(target, partial):
        snapshot = _copy(root, partial, connection, progress)
        _keep_only(partial, snapshot.versions)
        with closing(IdentityFiles(partial)) as files:
            files.write(snapshot.identity)
    if (root / ADMIN_KEY).is_file():
        shutil.copy2(root / ADMIN_KEY, partial / ADMIN_KEY)


@contextmanager
def _faults_of_target(target: Path, partial: Path) -> Iterator[None]:
    """Names the target where its disk is full or read-only: what is copied from is read alone.

    Raises:
        ResourceExhaustedError: STORE_FULL.
        FailedPreconditionError: STORE_READ_ONLY.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = found.reason if (found := store_error(error, partial)) is not None else ""
        if reason == FULL:
            raise ResourceExhaustedError(
                f"the disk of {target} is full: free space on it, or choose another target", reason=reason
            ) from error
        if reason == READ_ONLY:
            raise FailedPreconditionError(
                f"{target} cannot be written: mount it writable, or choose another target", reason=reason
            ) from error
        raise


def _remove_interrupted(target: Path) -> None:
    """Removes the files of killed backups to the same target: those that no process has locked."""
    for left in target.parent.glob(f".{escape(target.name[:200])}.{'[0-9a-f]' * 8}"):
        with suppress(OSError), Lock() as lock:
            lock.acquire(left, os.O_RDONLY | os.O_DIRECTORY)
            shutil.rmtree(left, ignore_errors=True)


def restore(source: Path, root: Path) -> Restored:
    """Replaces a store by a backup's copy; the former files are moved into a directory of the store.

    The restored store has a new id, so that a database of the former one does not match it.

    Raises:
        FailedPreconditionError: there is no usable backup, or the store is in use (STORE_IN_USE).
    """
    with store_faults(root, opening=True), lock_store(root):
        for left in root.glob(f"{RESTORING}*"):  # by a restore that was killed
            shutil.rmtree(left, ignore_errors=True)
        fresh = root / f"{RESTORING}{secrets.token_hex(4)}"
        try:
            with open_read_only(source) as connection, _faults_of_target(root, fresh):
                fresh.mkdir()
                _copy(source, fresh, connection)
            _renew_identity(fresh)
            report = inspect(fresh)
            os.sync()
            replaced = _swap_in(root, fresh)
            if (source / ADMIN_KEY).is_file() and not (root / ADMIN_KEY).exists():
                shutil.copy2(source / ADMIN_KEY, root / ADMIN_KEY)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return Restored(report, replaced)


def _copy(root: Path, target: Path, connection: sqlite3.Connection, progress: Progress = no_progress) -> Snapshot:
    """Copies the database and its objects; returns the copied database's snapshot."""
    for _ in range(ATTEMPTS):
        snapshot = _copy_database(connection, target)
        lost = 0
        for done, digest in enumerate(snapshot.versions):
            progress(done, len(snapshot.versions))
            lost += not _copy_object(root, target, digest, snapshot)
        if not lost or identity_in(connection) == snapshot.identity:
            break
    return snapshot


def _copy_database(connection: sqlite3.Connection, target: Path) -> Snapshot:
    path = target / DATABASE_FILE
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as copy:
        connection.backup(copy)
        prepare(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, readable also on a read-only disk
        return Snapshot.of(copy)


def _copy_object(root: Path, target: Path, digest: str, snapshot: Snapshot) -> bool:
    """Copies an object unless it was copied before; returns whether its program matches the database."""
    source, copy = ObjectStore(root).path(digest), ObjectStore(target).path(digest)
    wanted = snapshot.programs.get(digest)
    if ObjectStore(target).program_sum(digest) == wanted:
        return True
    if not is_digest(digest):
        return False
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    try:
        present = list(source.iterdir())
    except OSError:
        return False
    return {path.name: _copy_file(path, copy / path.name) for path in present}.get(PROGRAM_FILE) == wanted


def _copy_file(source: Path, target: Path) -> str | None:
    """Copies a file (no hard link, which would share damage); returns its sha256.

    Returns None, without a copy, for a file that cannot be read or is not regular.
    """
    digest = hashlib.sha256()
    try:
        file = open_regular(source)
    except OSError:
        return None
    with file, target.open("wb") as copy:
        while piece := _read(file):
            digest.update(piece)
            copy.write(piece)
    return digest.hexdigest()


def _read(file: BinaryIO) -> bytes:
    try:
        return file.read(1 << 20)
    except OSError:
        return b""  # its checksum will not match


def _keep_only(target: Path, digests: Iterable[str]) -> None:
    kept, objects = set(digests), ObjectStore(target)
    for digest in list(objects.digests()):
        if digest not in kept:
            shutil.rmtree(objects.path(digest))


def _renew_identity(target: Path) -> None:
    with closing(sqlite3.connect(target / DATABASE_FILE, isolation_level=None)) as connection:
        connection.execute("UPDATE identity SET store_id = ?", (secrets.token_hex(16),))
        with closing(IdentityFiles(target)) as files:
            files.write(identity_in(connection))


def _swap_in(root: Path, fresh: Path) -> Path | None:
    """Replaces a store's files; returns the directory of the former ones.

    The new identity is moved first and the database last: a store that is left incomplete by a crash is refused when it
    is opened, and not treated as empty.
    """
    present = [root / name for name in PARTS if (root / name).exists()]
    replaced = root / f"{time.strftime('replaced-%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}" if present else None
    if replaced is not None:
        replaced.mkdir()
        if (root / IDENTITY_FILE).exists():
            shutil.copy2(root / IDENTITY_FILE, replaced / IDENTITY_FILE)
    (fresh / IDENTITY_FILE).rename(root / IDENTITY_FILE)
    for path in present:
        if replaced is not None and path.name != IDENTITY_FILE:
            path.rename(replaced / path.name)
    for path in sorted(fresh.iterdir(), reverse=True):
        path.rename(root / path.name)
    return replaced
