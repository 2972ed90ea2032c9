"""One process at a time changes a store."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from deltamux.errors import FailedPreconditionError
from deltamux.store.faults import store_faults


def lock_store(root: Path) -> IO[str]:
    """Makes the store's directory where there is none, and locks it until the returned file is closed.

    Raises:
        FailedPreconditionError: another process has the store open (STORE_IN_USE).
    """
    with store_faults(root, opening=True):
        root.mkdir(parents=True, exist_ok=True)
        file = (root / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FailedPreconditionError(
            f"the store {root} is in use by another process: stop that server, or give this one a store of its own",
            reason="STORE_IN_USE",
        ) from None
    return file
