"""The compiled programs of a store: what base each is for, which are damaged, and new ones in their place."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from deltamux.errors import DataLossError, DeltamuxError, FailedPreconditionError
from deltamux.store.admission import Admission
from deltamux.store.database import VERSION_ROWS, Database
from deltamux.store.faults import store_faults
from deltamux.store.objects import IDENTITY_FILES, ObjectStore, content_digest
from deltamux.store.records import CompiledAdapter, VersionRecord

log = logging.getLogger("deltamux.store")


class StoredPrograms:
    """One program for each content; what changes here changes for every version that has the content.

    Args:
        moving: orders what moves objects.
        changed: called after records of versions have changed.

    Attributes:
        base_fingerprint: of the base that is served; "" where it is not known.
    """

    def __init__(
        self,
        root: Path,
        database: Database,
        objects: ObjectStore,
        admission: Admission,
        moving: threading.RLock,
        changed: Callable[[], None],
    ) -> None:
        self.base_fingerprint = ""
        self._root = root
        self._database = database
        self._objects = objects
        self._admission = admission
        self._moving = moving
        self._changed = changed
        self._agreed: set[tuple[str, str, int]] = set()

    def agrees(self, record: VersionRecord) -> bool:
        """Whether a version's row and its program are known to say the same; at once, without the disk."""
        return _said(record) in self._agreed

    def check_row(self, record: VersionRecord) -> None:
        """Reads what a version's program says of itself, and compares it with the version's row.

        Raises:
            DataLossError: they differ in the number of virtual tokens, by which requests are laid out (ROW_DAMAGED).
        """
        said, found = _said(record), self._objects.program_virtual_tokens(record.compiled.digest)
        if found not in (None, said[2]):
            raise DataLossError(
                f"the row of {record.key} is damaged: it says {said[2]} virtual tokens, and its program has {found}. "
                "Upload the same files again, to any adapter, or let `deltamux store check --repair` mend the store",
                reason="ROW_DAMAGED",
                metadata={"name": str(record.key), "digest": record.compiled.digest},
            )
        if found is not None:
            self._agreed.add(said)

    def serve_base(self, fingerprint: str) -> int:
        """Notes which base is served; returns how many versions have programs for another one."""
        self.base_fingerprint = fingerprint
        if fingerprint:
            self._database.note_base(fingerprint)
        others = (
            "SELECT count(*) FROM versions JOIN programs USING (digest) WHERE base_fingerprint NOT IN ('', ?)"
            " AND state <> 'DRAINING'"
        )
        return int(self._database.one(others, fingerprint)[0]) if fingerprint else 0

    def is_of_another_base(self, record: VersionRecord) -> bool:
        """Tells whether a version's program was compiled for a base that is known not to be the one served."""
        compiled_for = record.compiled.base_fingerprint
        return bool(compiled_for and self.base_fingerprint and compiled_for != self.base_fingerprint)

    def mark_damaged(self, record: VersionRecord, problem: str) -> None:
        """Notes that a version's program is missing or damaged, unless another has taken its place meanwhile."""
        self._mark(record, problem)

    def mark_whole(self, record: VersionRecord) -> None:
        """Notes that a version's program was read and is what was stored."""
        self._mark(record, "")

    def _mark(self, record: VersionRecord, damage: str) -> None:
        try:
            with self._database.transaction():
                self._database.run(
                    "UPDATE programs SET damage = ? WHERE digest = ? AND sha256 = ?",
                    damage, record.compiled.digest, record.program_sha256,
                )  # fmt: skip
        except DeltamuxError as error:  # what was found out is told all the same
            log.error("the state of %s cannot be noted: %s", record.key, error.message)
        self._changed()

    def kept_upload(self, record: VersionRecord) -> Path:
        """Returns the directory of a version's uploaded files, which were read and are what was uploaded.

        Raises:
            DataLossError: a file is missing or damaged (UPLOAD_DAMAGED).
        """
        with store_faults(self._root):
            if not self._objects.upload_is_whole(record.compiled.digest):
                raise DataLossError(
                    f"the stored upload of {record.key} is damaged: upload the same files again, to any adapter, and "
                    "it is repaired",
                    reason="UPLOAD_DAMAGED",
                    metadata={"name": str(record.key), "digest": record.compiled.digest},
                )
        return record.program.parent

    def versions_of(self, digest: str) -> list[VersionRecord]:
        """Returns the versions of a content, without those that drain."""
        rows = self._database.all(f"{VERSION_ROWS} AND digest = ? AND state <> 'DRAINING'", digest)
        return [self._database.version(row) for row in rows]

    def damaged(self) -> list[VersionRecord]:
        """Reads every program, and marks it by what is found; returns a version of each that is missing or damaged."""
        found: list[VersionRecord] = []
        for row in self._database.all("SELECT DISTINCT digest FROM versions WHERE state <> 'DRAINING'"):
            record = self.versions_of(row["digest"])[0]
            present = self._objects.program_sum(row["digest"])
            if present == record.program_sha256:
                self.mark_whole(record)
                self._mend_virtual_tokens(record.compiled.digest)
                continue
            self.mark_damaged(record, "its file is missing" if present is None else "its file is damaged")
            found.append(record)
        return found

    def _mend_virtual_tokens(self, digest: str) -> None:
        """Makes the rows of a content whose program is whole say what that says."""
        found, sql = self._objects.program_virtual_tokens(digest), "num_virtual_tokens IS NOT ? AND digest = ?"
        if found is not None and self._database.one(f"SELECT 1 FROM versions WHERE {sql}", found, digest):
            with self._database.transaction():
                self._database.run(f"UPDATE versions SET num_virtual_tokens = ? WHERE {sql}", found, found, digest)
            self._changed()

    def repair_upload(self, directory: Path, staged: Path) -> list[VersionRecord]:
        """Puts an upload's files in the place of those that are missing or damaged.

        Args:
            directory: with the files as they were uploaded.
            staged: an empty directory from `AdapterStore.staging`.
        Returns:
            the versions of that content; none where the store does not know it.
        Raises:
            FailedPreconditionError: the directory is not an upload.
        """
        try:
            for name in IDENTITY_FILES:
                shutil.copy(directory / name, staged / name)
        except OSError as error:
            raise FailedPreconditionError(
                f"{directory} is not an upload: {' and '.join(IDENTITY_FILES)} cannot be read there ({error.strerror})",
                reason="NO_UPLOAD",
            ) from error
        with self._moving, store_faults(self._root):
            digest = content_digest(staged)
            records = self.versions_of(digest)
            if records:
                self._objects.put(staged, digest, keep_program=True)
        return records

    def replace(self, staged: Path, compiled: CompiledAdapter) -> None:
        """Puts a newly compiled program, and the files beside it, in the place of a content's former ones.

        Raises:
            ResourceExhaustedError: the disk is full (STORE_FULL).
        """
        with self._moving, store_faults(self._root):
            if self._database.one("SELECT 1 FROM versions WHERE digest = ?", compiled.digest) is None:
                return  # deleted meanwhile
            placed = self._admission.place(staged, compiled)
            with self._database.transaction():
                self._admission.record(placed)
            self._changed()


def _said(record: VersionRecord) -> tuple[str, str, int]:
    return record.compiled.digest, record.program_sha256, record.compiled.num_virtual_tokens
