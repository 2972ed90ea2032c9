"""The lock of a store: one process at a time has it open."""

import fcntl
import os
from pathlib import Path
from typing import Self

from deltamux.errors import FailedPreconditionError
from deltamux.store.faults import store_faults


class Lock:
    """Exclusive locks on files and directories, held until they are closed or the process ends."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def acquire(self, path: Path, flags: int) -> None:
        """Locks a path; raises BlockingIOError if another process holds it."""
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        self._descriptors.append(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def lock_store(root: Path) -> Lock:
    """Creates the store's directory if it is missing, and locks it until the lock is closed.

    Both the directory and a file in it are locked: the file may be removed, and some file systems cannot lock
    directories.

    Raises:
        FailedPreconditionError: another process has the store open (STORE_IN_USE).
    """
    lock = Lock()
    try:
        with store_faults(root, opening=True):
            root.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(root / "lock", os.O_RDWR | os.O_CREAT)
                lock_directory(lock, root)
            except BlockingIOError:
                raise _in_use(root) from None
    except BaseException:
        lock.close()
        raise
    return lock


def lock_directory(lock: Lock, directory: Path) -> None:
    """Locks a directory if its file system can; raises BlockingIOError if another process holds it."""
    try:
        lock.acquire(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise


def _in_use(root: Path) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the store {root} is in use by another process: stop that server, or give this one a store of its own",
        reason="STORE_IN_USE",
    )
