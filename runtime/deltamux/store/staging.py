"""The steps of an upload into the store: staged, moved to the objects, recorded."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from deltamux.errors import AbortedError, FailedPreconditionError
from deltamux.store.database import Database
from deltamux.store.faults import store_faults
from deltamux.store.objects import PROGRAM_FILE, ObjectStore, file_sum
from deltamux.store.records import CompiledAdapter


class StoredContent(NamedTuple):
    """A content that is among the objects, and the sha256 of its program's file, in hex."""

    compiled: CompiledAdapter
    program_sum: str


class StagedUploads:
    """The uploads under way and their files. `move_to_objects` and `record` are called for one upload at a time."""

    def __init__(self, root: Path, database: Database, objects: ObjectStore) -> None:
        self._root = root
        self._database = database
        self._objects = objects
        self._lock = threading.Lock()  # also acquired on the event loop: held for no disk access
        # The number of deletions when each upload began, and the number of each tenant's deletion.
        self._began: dict[Path, int] = {}
        self._deletions: dict[str, int] = {}
        self._num_deletions = 0

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yields an empty directory for an upload, which begins here; the directory is removed after the block."""
        with store_faults(self._root), self._objects.staging() as staged:
            with self._lock:
                self._began[staged] = self._num_deletions
            try:
                yield staged
            finally:
                with self._lock:
                    del self._began[staged]
                    if not self._began:
                        self._deletions.clear()

    def tenant_deleted(self, tenant: str) -> None:
        """Records a tenant's deletion, which ends its uploads under way."""
        with self._lock:
            self._num_deletions += 1
            self._deletions[tenant] = self._num_deletions

    def check_tenant(self, staged: Path, tenant: str) -> None:
        """Raises AbortedError if the tenant was deleted after the upload began."""
        with self._lock:
            lost = self._deletions.get(tenant, 0) > self._began.get(staged, self._num_deletions)
        if lost:
            raise AbortedError(
                f"tenants/{tenant} was deleted during this upload, which is refused: create the tenant again if it is "
                "to have adapters, and upload again",
                reason="TENANT_DELETED",
                metadata={"name": f"tenants/{tenant}"},
            )

    def move_to_objects(self, staged: Path, compiled: CompiledAdapter) -> StoredContent:
        """Moves staged files to the objects, marked as garbage while no version refers to them.

        A stored program is kept if it is undamaged and of the same base.
        """
        if not (staged / PROGRAM_FILE).is_file():
            raise FailedPreconditionError(f"the staged upload has no {PROGRAM_FILE}", reason="NOT_COMPILED")
        digest = compiled.digest
        known = self._database.fetch_one("SELECT * FROM programs WHERE digest = ?", digest)
        keep: bool = (
            known is not None
            and known["base_fingerprint"] == compiled.base_fingerprint
            and known["sha256"] == self._objects.program_sum(digest)
        )
        program_sum: str = known["sha256"] if keep else file_sum(staged / PROGRAM_FILE)
        if known is None and not self._objects.path(digest).exists():
            with self._database.transaction():
                self._database.execute("INSERT OR IGNORE INTO garbage VALUES (?)", digest)
        self._objects.put(staged, digest, keep_program=keep)
        return StoredContent(compiled, program_sum)

    def record(self, stored: StoredContent) -> None:
        """Records a content's program as undamaged and not garbage, inside the caller's transaction."""
        run, compiled = self._database.execute, stored.compiled
        run(
            "INSERT OR REPLACE INTO programs VALUES (?, ?, ?, '')",
            compiled.digest, stored.program_sum, compiled.base_fingerprint,
        )  # fmt: skip
        # Also if the program is kept, to repair a damaged row.
        run(
            "UPDATE versions SET method = ?, rank = ?, num_virtual_tokens = ?, num_bytes = ? WHERE digest = ?",
            compiled.method, compiled.rank, compiled.num_virtual_tokens, compiled.num_bytes, compiled.digest,
        )  # fmt: skip
        run("DELETE FROM garbage WHERE digest = ?", compiled.digest)
