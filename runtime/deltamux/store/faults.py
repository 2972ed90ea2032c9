"""Translation of errors of the disk and of SQLite to `DeltamuxError`s: full, read-only, damaged, failing."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltamux.errors import DeltamuxError, FailedPreconditionError, ResourceExhaustedError, UnavailableError

FULL, READ_ONLY, CORRUPT, FAILING, BUSY = "STORE_FULL", "STORE_READ_ONLY", "STORE_CORRUPT", "STORE_IO", "STORE_BUSY"
NO_PLACE, GONE = "STORE_PATH", "STORE_GONE"

_OF_ERRNO = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EROFS: READ_ONLY,
    errno.EACCES: READ_ONLY,
    errno.EPERM: READ_ONLY,
    errno.EIO: FAILING,
}
_OF_SQLITE = {
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_READONLY: READ_ONLY,
    sqlite3.SQLITE_PERM: READ_ONLY,
    sqlite3.SQLITE_CORRUPT: CORRUPT,
    sqlite3.SQLITE_NOTADB: CORRUPT,
    sqlite3.SQLITE_IOERR: FAILING,
    sqlite3.SQLITE_CANTOPEN: FAILING,
    sqlite3.SQLITE_BUSY: BUSY,
    sqlite3.SQLITE_LOCKED: BUSY,
}
_MESSAGES = {
    FULL: "the disk of the store {root} is full: free space on it, or delete adapters (which works), and try again",
    READ_ONLY: "the store {root} cannot be written: mount it writable, or give its files to the user of the server",
    CORRUPT: (
        "the database of the store {root} is damaged: restore a backup with `deltamux store restore BACKUP {root}`; "
        "without one, move {root}/db.sqlite3 away and start again with `deltamux store check {root} --adopt`, which "
        "keeps the objects"
    ),
    FAILING: "the disk of the store {root} fails to read or write: see the system's log",
    BUSY: "the database of the store {root} is locked by another program: end that program, and try again",
    GONE: (
        "the store {root} was moved, removed or replaced under this server: put it back as it was, and start the "
        "server again; changes until then would be lost"
    ),
    NO_PLACE: "{root} cannot be a store: {problem}: give a directory, or the name of one that can be created",
}
PROBE_BYTES = 64 << 10


@contextmanager
def store_faults(root: Path, *, opening: bool = False) -> Iterator[None]:
    """Maps errors of the disk and of SQLite inside the block to `DeltamuxError`s.

    Args:
        opening: whether the store is being opened: an unusable store is FAILED_PRECONDITION then, UNAVAILABLE later.
    Raises:
        ResourceExhaustedError: STORE_FULL.
        FailedPreconditionError, UnavailableError: STORE_READ_ONLY, STORE_CORRUPT, STORE_IO or STORE_BUSY.
        FailedPreconditionError: while opening, for every other error of the system: STORE_PATH.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as raised:
        error = store_error(raised, root, opening=opening)
        if error is None:
            raise
        raise error from raised
    except UnavailableError as error:
        if opening and error.reason in _MESSAGES:
            raise FailedPreconditionError(error.message, reason=error.reason) from error
        raise


def gone_error(root: Path) -> UnavailableError:
    """Returns the error of an open store whose files were moved or removed."""
    return UnavailableError(_MESSAGES[GONE].format(root=root), reason=GONE)


def store_error(raised: BaseException, root: Path, *, opening: bool = False) -> DeltamuxError | None:
    """Returns the store's error for one of the disk or of SQLite; None for any other."""
    reason = _reason(raised, root)
    if opening and ((reason is None and isinstance(raised, OSError)) or (reason == FAILING and _cannot_open(raised))):
        reason = NO_PLACE
    if reason is None:
        return None
    text = _MESSAGES[reason].format(root=root, problem=_problem(raised))
    if reason == FULL:
        return ResourceExhaustedError(text, reason=reason)
    return (FailedPreconditionError if opening else UnavailableError)(text, reason=reason)


def _reason(raised: BaseException, root: Path) -> str | None:
    if isinstance(raised, OSError):
        return _OF_ERRNO.get(raised.errno or 0)
    code: int | None = getattr(raised, "sqlite_errorcode", None)
    if code is None:
        return None
    reason = _OF_SQLITE.get(code & 0xFF)
    return _probe_fault(root) or reason if reason == FAILING else reason


def _cannot_open(raised: BaseException) -> bool:
    """Whether SQLite cannot open a file, as for a path that is too long or names a folder."""
    code: int = getattr(raised, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_CANTOPEN


def _problem(raised: BaseException) -> str:
    """Returns the system's message, with the file."""
    if not isinstance(raised, OSError):
        return str(raised)
    return ": ".join(str(part) for part in (raised.filename, raised.strerror) if part) or str(raised)


def _probe_fault(root: Path) -> str | None:
    """Returns why a small file cannot be written, or None: SQLite reports most causes as an I/O error."""
    path = root / ".probe"
    try:
        path.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        return _OF_ERRNO.get(error.errno or 0)
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return None


class Reserve:
    """A file that reserves disk space, so that deletions work on a full disk."""

    NUM_BYTES = 4 << 20

    def __init__(self, root: Path) -> None:
        self._path = root / "reserve"
        self._held = False

    def fill(self) -> None:
        """Allocates the file, unless it is allocated or the disk is full."""
        if self._held:
            return
        try:
            with self._path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, self.NUM_BYTES)
            self._held = True
        except OSError:
            self.release()

    def release(self) -> None:
        """Removes the file."""
        self._held = False
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
