"""The compiled programs of a store: their base, their damage, and their replacement."""

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from deltamux.errors import DataLossError, DeltamuxError, FailedPreconditionError
from deltamux.store.database import Database
from deltamux.store.faults import store_faults
from deltamux.store.objects import IDENTITY_FILES, ObjectStore, content_digest
from deltamux.store.records import CompiledAdapter, VersionRecord
from deltamux.store.staging import StagedUploads

log = logging.getLogger("deltamux.store")


class StoredPrograms:
    """The programs, one per content, shared by all versions with that content.

    Args:
        objects_lock: held while objects are moved.
        on_changed: called after versions have changed.

    Attributes:
        base_fingerprint: of the served base; "" if it is not known.
    """

    def __init__(
        self,
        root: Path,
        database: Database,
        objects: ObjectStore,
        staged_uploads: StagedUploads,
        objects_lock: threading.RLock,
        on_changed: Callable[[], None],
    ) -> None:
        self.base_fingerprint = ""
        self._root = root
        self._database = database
        self._objects = objects
        self._staged_uploads = staged_uploads
        self._objects_lock = objects_lock
        self._on_changed = on_changed
        self._checked_rows: set[tuple[str, str, int]] = set()

    def row_is_checked(self, record: VersionRecord) -> bool:
        """Whether a version's row was compared with its program; without disk access."""
        return _row_key(record) in self._checked_rows

    def check_row(self, record: VersionRecord) -> None:
        """Compares a version's row with the metadata of its program.

        Raises:
            DataLossError: they differ in the number of virtual tokens, which determines positions (ROW_DAMAGED).
        """
        key, found = _row_key(record), self._objects.program_virtual_tokens(record.compiled.digest)
        if found not in (None, key[2]):
            raise DataLossError(
                f"the row of {record.key} is damaged: it has {key[2]} virtual tokens, and its program has {found}. "
                "Upload the same files again, to any adapter, or repair the store with `deltamux store check --repair`",
                reason="ROW_DAMAGED",
                metadata={"name": str(record.key), "digest": record.compiled.digest},
            )
        if found is not None:
            self._checked_rows.add(key)

    def set_base(self, fingerprint: str) -> int:
        """Sets the served base; returns the number of versions whose programs are for another one."""
        self.base_fingerprint = fingerprint
        if fingerprint:
            self._database.set_base(fingerprint)
        others = (
            "SELECT count(*) FROM versions JOIN programs USING (digest) WHERE base_fingerprint NOT IN ('', ?)"
            " AND state <> 'DRAINING'"
        )
        return int(self._database.fetch_one(others, fingerprint)[0]) if fingerprint else 0

    def is_of_another_base(self, record: VersionRecord) -> bool:
        """Whether a version's program was compiled for another base than the served one, as far as both are known."""
        compiled_for = record.compiled.base_fingerprint
        return bool(compiled_for and self.base_fingerprint and compiled_for != self.base_fingerprint)

    def mark_damaged(self, record: VersionRecord, problem: str) -> None:
        """Marks a version's program as missing or damaged, unless it was replaced meanwhile."""
        self._mark(record, problem)

    def clear_damage(self, record: VersionRecord) -> None:
        """Removes the mark of a version's program that was read and is undamaged."""
        self._mark(record, "")

    def _mark(self, record: VersionRecord, damage: str) -> None:
        try:
            with self._database.transaction():
                self._database.execute(
                    "UPDATE programs SET damage = ? WHERE digest = ? AND sha256 = ?",
                    damage, record.compiled.digest, record.program_sha256,
                )  # fmt: skip
        except DeltamuxError as error:  # the caller raises the damage itself
            log.error("the state of %s cannot be stored: %s", record.key, error.message)
        self._on_changed()

    def checked_upload(self, record: VersionRecord) -> Path:
        """Returns the directory of a version's uploaded files, after a check of their digest.

        Raises:
            DataLossError: a file is missing or damaged (UPLOAD_DAMAGED).
        """
        with store_faults(self._root):
            if not self._objects.upload_is_whole(record.compiled.digest):
                raise DataLossError(
                    f"the stored upload of {record.key} is damaged: upload the same files again, to any adapter, to "
                    "repair it",
                    reason="UPLOAD_DAMAGED",
                    metadata={"name": str(record.key), "digest": record.compiled.digest},
                )
        return record.program.parent

    def versions_of(self, digest: str) -> list[VersionRecord]:
        """Returns the versions of a content that are not draining."""
        return self._database.versions("digest = ? AND state <> 'DRAINING'", digest)

    def damaged(self) -> list[VersionRecord]:
        """Checks and marks every program; returns a version of each one that is missing or damaged."""
        found: list[VersionRecord] = []
        for row in self._database.fetch_all("SELECT DISTINCT digest FROM versions WHERE state <> 'DRAINING'"):
            record = self.versions_of(row["digest"])[0]
            present = self._objects.program_sum(row["digest"])
            if present == record.program_sha256:
                self.clear_damage(record)
                self._repair_virtual_tokens(record.compiled.digest)
                continue
            self.mark_damaged(record, "its file is missing" if present is None else "its file is damaged")
            found.append(record)
        return found

    def _repair_virtual_tokens(self, digest: str) -> None:
        """Sets the number of virtual tokens in a content's rows to that of its undamaged program."""
        found, sql = self._objects.program_virtual_tokens(digest), "num_virtual_tokens IS NOT ? AND digest = ?"
        if found is not None and self._database.fetch_one(f"SELECT 1 FROM versions WHERE {sql}", found, digest):
            with self._database.transaction():
                self._database.execute(f"UPDATE versions SET num_virtual_tokens = ? WHERE {sql}", found, found, digest)
            self._on_changed()

    def repair_upload(self, directory: Path, staged: Path) -> list[VersionRecord]:
        """Replaces missing or damaged files of an upload.

        Args:
            directory: contains the files as they were uploaded.
            staged: an empty directory from `AdapterStore.staging`.
        Returns:
            the versions of that content; an empty list if it is not in the store.
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
        with self._objects_lock, store_faults(self._root):
            digest = content_digest(staged)
            records = self.versions_of(digest)
            if records:
                self._objects.put(staged, digest, keep_program=True)
        return records

    def replace(self, staged: Path, compiled: CompiledAdapter) -> None:
        """Replaces a content's program and files by newly compiled ones.

        Raises:
            ResourceExhaustedError: the disk is full (STORE_FULL).
        """
        with self._objects_lock, store_faults(self._root):
            if self._database.fetch_one("SELECT 1 FROM versions WHERE digest = ?", compiled.digest) is None:
                return  # deleted meanwhile
            stored = self._staged_uploads.move_to_objects(staged, compiled)
            with self._database.transaction():
                self._staged_uploads.record(stored)
            self._on_changed()


def _row_key(record: VersionRecord) -> tuple[str, str, int]:
    return record.compiled.digest, record.program_sha256, record.compiled.num_virtual_tokens
