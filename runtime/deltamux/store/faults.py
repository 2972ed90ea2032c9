"""What the disk and SQLite raise, as errors of the family: full, read-only, damaged, failing."""

from __future__ import annotations

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
_WORDS = {
    FULL: "the disk of the store {root} is full: free space on it, or delete adapters (which works), and try again",
    READ_ONLY: "the store {root} cannot be written: mount it writable, or give its files to the user of the server",
    CORRUPT: (
        "the database of the store {root} is damaged: restore a backup with `deltamux store restore BACKUP {root}`; "
        "without one, move {root}/db.sqlite3 away and begin anew with `deltamux store check {root} --adopt`, which "
        "keeps the objects"
    ),
    FAILING: "the disk of the store {root} does not read or write: the system's log says why",
    BUSY: "the database of the store {root} is locked by another program: end that program, and try again",
    GONE: (
        "the store {root} was moved, removed or replaced under this server: put it back as it was, and start the "
        "server again; what is changed until then would be lost"
    ),
    NO_PLACE: "{root} cannot be a store: {problem}: give a directory, or the name of one that can be made",
}
PROBE_BYTES = 64 << 10


@contextmanager
def store_faults(root: Path, *, opening: bool = False) -> Iterator[None]:
    """Turns what the disk and SQLite raise inside the block into errors of the family.

    Args:
        opening: whether the store is being opened: what cannot be used then is FAILED_PRECONDITION, later UNAVAILABLE.
    Raises:
        ResourceExhaustedError: STORE_FULL.
        FailedPreconditionError, UnavailableError: STORE_READ_ONLY, STORE_CORRUPT, STORE_IO or STORE_BUSY.
        FailedPreconditionError: while opening, for whatever else the system refuses: STORE_PATH.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as raised:
        error = store_error(raised, root, opening=opening)
        if error is None:
            raise
        raise error from raised
    except UnavailableError as error:
        if opening and error.reason in _WORDS:
            raise FailedPreconditionError(error.message, reason=error.reason) from error
        raise


def gone(root: Path) -> UnavailableError:
    """Returns the error of a store whose files are no longer where they were when it opened."""
    return UnavailableError(_WORDS[GONE].format(root=root), reason=GONE)


def store_error(raised: BaseException, root: Path, *, opening: bool = False) -> DeltamuxError | None:
    """Returns what an error of the disk or of SQLite means for the store; None if it is of another kind."""
    reason = _reason(raised, root)
    if opening and ((reason is None and isinstance(raised, OSError)) or (reason == FAILING and _is_no_file(raised))):
        reason = NO_PLACE
    if reason is None:
        return None
    text = _WORDS[reason].format(root=root, problem=_problem(raised))
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
    return _tried(root) or reason if reason == FAILING else reason


def _is_no_file(raised: BaseException) -> bool:
    """Whether SQLite cannot open a file although the disk works: a folder has its name, or its path is too long."""
    code: int = getattr(raised, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_CANTOPEN


def _problem(raised: BaseException) -> str:
    """Returns the system's words for what it refused, with the file."""
    if not isinstance(raised, OSError):
        return str(raised)
    return ": ".join(str(part) for part in (raised.filename, raised.strerror) if part) or str(raised)


def _tried(root: Path) -> str | None:
    """Returns why a little file cannot be written; None where it can. SQLite calls most of that an I/O error."""
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
    """A file that keeps some space of the disk, so that a full one has enough left for deleting."""

    NUM_BYTES = 4 << 20

    def __init__(self, root: Path) -> None:
        self._path = root / "reserve"
        self._held = False

    def fill(self) -> None:
        """Takes the space, unless it is held, where it is to be had."""
        if self._held:
            return
        try:
            with self._path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, self.NUM_BYTES)
            self._held = True
        except OSError:
            self.release()

    def release(self) -> None:
        """Gives the space up."""
        self._held = False
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
