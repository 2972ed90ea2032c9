"""`deltamux store check`: programs against checksums, rows against files, files against rows; read-only."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from deltamux.errors import FailedPreconditionError
from deltamux.store import rows, schema
from deltamux.store.database_checks import DATABASE_FILE, check_database, check_present, identity_in
from deltamux.store.faults import store_faults
from deltamux.store.identity import Identity, IdentityFiles
from deltamux.store.objects import ObjectStore
from deltamux.store.records import VersionKey
from deltamux.store.row_checks import RowFault, row_faults

ATTEMPTS = 5
"""Attempts with a store that is in use and changes between the reads of the database and of the files."""

Progress = Callable[[int, int], None]
"""Called with the number of checked contents and of all."""


def no_progress(done: int, total: int) -> None:
    """Ignores the progress."""


class Kind(StrEnum):
    """The kinds of findings."""

    PROGRAM_MISSING = "PROGRAM_MISSING"
    PROGRAM_DAMAGED = "PROGRAM_DAMAGED"
    UPLOAD_DAMAGED = "UPLOAD_DAMAGED"
    ORPHAN = "ORPHAN"
    ROW_DAMAGED = "ROW_DAMAGED"


MEANINGS = {
    Kind.PROGRAM_MISSING: "the compiled program is missing, and the versions cannot be served",
    Kind.PROGRAM_DAMAGED: "the compiled program is damaged, and the versions are refused",
    Kind.UPLOAD_DAMAGED: "an uploaded file is missing or damaged; the versions serve as long as their program is "
    "undamaged",
    Kind.ORPHAN: "no version refers to this object; `deltamux store gc` removes it",
    Kind.ROW_DAMAGED: "its row",
}


@dataclass(frozen=True)
class Finding:
    """One problem of a store.

    Attributes:
        digest: of the content; "" for a row.
        versions: names of the affected versions; for a row, its own name.
        problem: a row's problem.
    """

    kind: Kind
    digest: str
    versions: tuple[str, ...] = ()
    problem: str = ""

    @property
    def message(self) -> str:
        return f"{MEANINGS[self.kind]} {self.problem}".rstrip()


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        versions, contents: their numbers; versions of equal files share one content.
    """

    root: Path
    identity: Identity
    versions: int
    contents: int
    findings: tuple[Finding, ...]

    def of_kind(self, *kinds: Kind) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind in kinds]


@dataclass(frozen=True)
class Snapshot:
    """The objects by the database: the program's sha256 and the versions of each content.

    Attributes:
        faults: problems of rows.
        virtual_tokens: by content and version name, the number in the row.
    """

    identity: Identity
    programs: dict[str, str]
    versions: dict[str, tuple[str, ...]]
    garbage: frozenset[str]
    faults: tuple[RowFault, ...]
    virtual_tokens: dict[str, dict[str, object]]

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Self:
        connection.execute("BEGIN")
        virtual_tokens: dict[str, dict[str, object]] = {}
        for tenant, adapter, number, digest, tokens in connection.execute(
            "SELECT tenant, adapter, number, digest, num_virtual_tokens FROM versions ORDER BY tenant, adapter, number"
        ):
            # The digest of a damaged row may be anything.
            virtual_tokens.setdefault(str(digest), {})[str(VersionKey(tenant, adapter, number))] = tokens
        versions = {digest: tuple(names) for digest, names in virtual_tokens.items()}
        programs: dict[str, str] = dict(connection.execute("SELECT digest, sha256 FROM programs"))
        garbage = frozenset(row[0] for row in connection.execute("SELECT digest FROM garbage"))
        identity = identity_in(connection)
        faults = tuple(row_faults(connection))
        connection.execute("COMMIT")
        return cls(identity, programs, versions, garbage, faults, virtual_tokens)


@contextmanager
def open_read_only(root: Path) -> Iterator[sqlite3.Connection]:
    """Yields a read-only connection to a store's database, which may be in use, after checks of the database.

    Raises:
        FailedPreconditionError: there is no store, or its database cannot be used; the message has the remedy.
    """
    with store_faults(root, opening=True):
        files = IdentityFiles(root).read()
        claimed = files is not None or next(ObjectStore(root).digests(), None) is not None
        check_present(root, files, claimed=claimed)
        if not (root / DATABASE_FILE).exists():
            raise FailedPreconditionError(f"{root} is not a store", reason="NO_STORE")
        uri = f"{(root / DATABASE_FILE).absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            rows.prepare(connection)
            if check_database(connection, root, files, claimed=claimed) < schema.SCHEMA_VERSION:
                raise FailedPreconditionError(
                    f"the store {root} is of an earlier deltamux: start the server once, which migrates it",
                    reason="STORE_SCHEMA",
                )
            yield connection


def inspect(root: Path, progress: Progress = no_progress) -> Report:
    """Checks a whole store, which may be in use, and changes nothing.

    Args:
        progress: called with the progress.
    Raises:
        FailedPreconditionError: there is no store, or its database cannot be used.
    """
    objects = ObjectStore(root)
    with open_read_only(root) as connection, store_faults(root, opening=True):
        for _ in range(ATTEMPTS):
            snapshot = Snapshot.of(connection)
            damaged = (Finding(Kind.ROW_DAMAGED, "", (fault.name,), fault.problem) for fault in snapshot.faults)
            findings = [*damaged, *_content_findings(objects, snapshot, progress), *_orphan_findings(objects, snapshot)]
            # A store in use may have changed between the reads of rows and files.
            if not findings or identity_in(connection) == snapshot.identity:
                break
    count = sum(map(len, snapshot.versions.values()))
    return Report(root, snapshot.identity, count, len(snapshot.versions), tuple(findings))


def _content_findings(objects: ObjectStore, snapshot: Snapshot, progress: Progress) -> Iterator[Finding]:
    for done, (digest, names) in enumerate(sorted(snapshot.versions.items(), key=lambda item: item[1])):
        progress(done, len(snapshot.versions))
        found = objects.program_sum(digest)
        if found is None:
            yield Finding(Kind.PROGRAM_MISSING, digest, names)
        elif found != snapshot.programs.get(digest):
            yield Finding(Kind.PROGRAM_DAMAGED, digest, names)
        else:
            yield from _token_findings(objects, digest, snapshot)
        if not objects.upload_is_whole(digest):
            yield Finding(Kind.UPLOAD_DAMAGED, digest, names)


def _token_findings(objects: ObjectStore, digest: str, snapshot: Snapshot) -> Iterator[Finding]:
    """Yields the versions whose rows have another number of virtual tokens than their undamaged program."""
    has = objects.program_virtual_tokens(digest)
    for name, tokens in snapshot.virtual_tokens[digest].items():
        if has is not None and tokens != has:
            problem = f"has {str(tokens)[:20]} virtual tokens, and its program has {has}"
            yield Finding(Kind.ROW_DAMAGED, digest, (name,), problem)


def _orphan_findings(objects: ObjectStore, snapshot: Snapshot) -> Iterator[Finding]:
    known = snapshot.versions.keys() | snapshot.garbage
    return (Finding(Kind.ORPHAN, digest) for digest in sorted(objects.digests()) if digest not in known)
