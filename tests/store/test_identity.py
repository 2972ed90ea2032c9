"""A database that does not belong to the objects is refused, and only garbage is deleted."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from deltamux.errors import FailedPreconditionError, NotFoundError
from deltamux.store import AdapterKey, AdapterStore, Canary, VersionState
from deltamux.store.inspection import inspect
from deltamux.store.schema import SCHEMA_1
from deltamux_testing.uploads import KEY, copy_of, execute, objects, opened, upload


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A closed store with two versions, and a copy of its database from before the second."""
    root = tmp_path / "store"
    with opened(root) as store:
        upload(store, "one")
    shutil.copy(root / "db.sqlite3", tmp_path / "older.sqlite3")
    with opened(root) as store:
        upload(store, "two")
    return root


Harm = Callable[[Path], object]


def missing(root: Path) -> None:
    (root / "db.sqlite3").unlink()


def missing_with_its_log(root: Path) -> None:
    missing(root)
    (root / "db.sqlite3-wal").write_bytes(b"\0" * 4096)


def blank(root: Path) -> None:
    missing(root)
    execute(root, "VACUUM")


def older(root: Path) -> None:
    shutil.copy(root.parent / "older.sqlite3", root / "db.sqlite3")


def older_of_schema_1(root: Path) -> None:
    missing(root)
    first_schema(root)


def of_another_store(root: Path) -> None:
    with opened(root.parent / "other") as other:
        for content in "abcdef":
            upload(other, content)
    shutil.copy(root.parent / "other" / "db.sqlite3", root / "db.sqlite3")


def of_another_program(root: Path) -> None:
    missing(root)
    execute(root, "CREATE TABLE bookmarks (url TEXT)")


def overwritten(root: Path, place: int, data: bytes) -> None:
    with (root / "db.sqlite3").open("r+b") as file:
        file.seek(place)
        file.write(data)


def identity(replace: Callable[[Path], object]) -> Harm:
    """Returns what puts something else in the place of the identity file."""

    def harm(root: Path) -> None:
        (root / "store.json").unlink()
        replace(root / "store.json")

    return harm


def sql(statement: str) -> Harm:
    return lambda root: execute(root, statement)


HARMS: dict[str, tuple[Harm, str, str]] = {
    "missing": (missing, "STORE_MISMATCH", "is missing"),
    "missing, and a log": (missing_with_its_log, "STORE_MISMATCH", "is missing"),
    "empty": (lambda root: (root / "db.sqlite3").write_bytes(b""), "STORE_MISMATCH", "is empty"),
    "blank": (blank, "STORE_MISMATCH", "is empty"),
    "older": (older, "STORE_OUTDATED", "older copy"),
    "older, of schema 1": (older_of_schema_1, "STORE_OUTDATED", "older copy"),
    "of another store": (of_another_store, "STORE_MISMATCH", "the objects are of store"),
    "of another program": (of_another_program, "STORE_MISMATCH", "not of deltamux"),
    "newer": (sql("PRAGMA user_version = 99"), "STORE_SCHEMA", "start the one that wrote it"),
    "header damaged": (lambda root: overwritten(root, 0, b"no database here"), "STORE_CORRUPT", "store restore"),
    "page damaged": (lambda root: overwritten(root, 4096, b"\xff" * 8192), "STORE_CORRUPT", "store restore"),
    "with a trigger": (
        sql("CREATE TRIGGER t AFTER UPDATE ON identity BEGIN DELETE FROM versions; END"),
        "STORE_CORRUPT",
        "store restore",
    ),
    "with a view": (sql("CREATE VIEW v AS SELECT * FROM versions"), "STORE_CORRUPT", "store restore"),
    "without a table": (sql("DROP TABLE promotions"), "STORE_CORRUPT", "store restore"),
    "without a column": (sql("ALTER TABLE versions DROP COLUMN labels"), "STORE_CORRUPT", "store restore"),
    "without its identity": (sql("DELETE FROM identity"), "STORE_CORRUPT", "store restore"),
    "an identity of text": (sql("UPDATE identity SET generation = 'x'"), "STORE_CORRUPT", "store restore"),
    "two identities": (sql("INSERT INTO identity SELECT * FROM identity"), "STORE_CORRUPT", "store restore"),
    "of a negative schema": (sql("PRAGMA user_version = -1"), "STORE_CORRUPT", "store restore"),
    "no identity file": (identity(lambda file: None), "STORE_MISMATCH", "store.json next to it is missing"),
    "identity file cut": (identity(lambda f: f.write_text('{"format": ')), "STORE_CORRUPT", "store.json is damaged"),
    "identity file deep": (identity(lambda f: f.write_text("[" * 200_000)), "STORE_CORRUPT", "store.json is damaged"),
    "a folder for identity file": (identity(Path.mkdir), "STORE_PATH", "Is a directory"),
    "a pipe for identity file": (identity(os.mkfifo), "STORE_PATH", "not a regular file"),
}
ACCEPTED = ("missing", "empty", "older", "older, of schema 1", "of another store", "no identity file")
"""What is lost with the consent of whoever opens the store."""


@pytest.mark.parametrize("case", HARMS)
def test_a_database_that_does_not_belong_is_refused_and_nothing_is_deleted(case: str, root: Path) -> None:
    harm, reason, words = HARMS[case]
    before = objects(root)
    harm(root)
    for _ in range(2):
        with pytest.raises(FailedPreconditionError, match=words) as refused:
            AdapterStore.open(root)
        assert refused.value.reason == reason
        with pytest.raises(FailedPreconditionError) as refused:
            inspect(root)
        assert refused.value.reason == reason
    assert objects(root) == before


@pytest.mark.parametrize("place", ["file", "file/store"])
def test_looking_at_what_is_not_a_directory_is_refused_in_a_sentence(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPreconditionError, match="Not a directory"):
        inspect(tmp_path / place)


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_loss_that_is_accepted_lets_the_store_open_and_deletes_no_object(case: str, root: Path) -> None:
    before = objects(root)
    HARMS[case][0](root)
    AdapterStore.open(root, adopt=True).close()
    with opened(root) as store:
        upload(store, "three")
    assert objects(root) > before


def test_a_store_without_objects_is_refused_too_when_its_database_is_missing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.tenants.create("acme")
    missing(tmp_path)
    with pytest.raises(FailedPreconditionError, match="is missing"):
        AdapterStore.open(tmp_path)


def test_an_older_copy_made_while_the_store_was_open_is_noticed_too(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        upload(store, "one")
        copy = copy_of(tmp_path / "store", tmp_path / "copy")
        store.tenants.create("revoked")
    for name in ("db.sqlite3", "db.sqlite3-wal"):
        shutil.copy(copy / name, tmp_path / "store" / name)
    with pytest.raises(FailedPreconditionError, match="older copy"):
        AdapterStore.open(tmp_path / "store")


def test_a_crash_before_the_identity_or_the_generation_is_written_is_no_mismatch(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        execute(tmp_path, "UPDATE identity SET generation = 0")
        (tmp_path / "store.json").unlink()
        (tmp_path / "generation").unlink()
    with opened(tmp_path) as store:
        upload(store, "one")
    (tmp_path / "generation").write_text("")  # as a power cut may leave it
    with opened(tmp_path) as store:
        assert store.adapter(KEY).serving == 1


def killed(root: Path, content: str) -> Path:
    """Returns a store as a kill -9 leaves it, its last changes in SQLite's log."""
    with opened(root) as store:
        upload(store, content)
        copy = copy_of(root, root.with_name(f"{root.name}-killed"))
    return copy


def test_a_log_of_another_database_is_refused_and_not_merged(tmp_path: Path) -> None:
    one, other = killed(tmp_path / "one", "one"), killed(tmp_path / "other", "two")
    log, database = one / "db.sqlite3-wal", one / "db.sqlite3"
    own, before = log.read_bytes(), database.read_bytes()
    shutil.copy(other / "db.sqlite3-wal", log)
    with pytest.raises(FailedPreconditionError) as refused:
        AdapterStore.open(one)
    assert refused.value.reason == "STORE_MISMATCH"
    assert database.read_bytes() == before
    log.write_bytes(own)
    with opened(one) as store:
        assert [version.key.number for version in store.versions(KEY)] == [1]


def test_a_generation_that_is_a_pipe_is_one_that_lags(root: Path) -> None:
    (root / "generation").unlink()
    os.mkfifo(root / "generation")
    assert inspect(root).versions == 2


def test_an_object_that_no_row_refers_to_is_kept(root: Path) -> None:
    orphan = root / "objects" / "ab" / ("ab" * 32)
    orphan.mkdir(parents=True)
    for _ in range(2):
        AdapterStore.open(root).close()
    assert orphan.is_dir()


def test_what_a_crash_between_files_and_rows_has_left_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(root) as store:
        before = objects(root)
        put = store._objects.put
        copies: list[Path] = []

        def put_and_copy(staged: Path, digest: str, *, keep_program: bool = False) -> None:
            put(staged, digest, keep_program=keep_program)
            copies.append(copy_of(root, root.parent / "crashed"))

        monkeypatch.setattr(store._objects, "put", put_and_copy)
        upload(store, "three")
    assert len(objects(copies[0])) == len(before) + 1
    AdapterStore.open(copies[0]).close()
    assert objects(copies[0]) == before


def first_schema(root: Path, contents: tuple[str, ...] = ("one", "two")) -> None:
    """Makes a database as version 1 wrote it, for the objects that are there."""
    found = {
        (directory / "adapter_config.json").read_text(): directory.name for directory in (root / "objects").glob("*/*")
    }
    connection = sqlite3.connect(root / "db.sqlite3")
    connection.executescript(f"{SCHEMA_1} PRAGMA user_version = 1; PRAGMA journal_mode = WAL;")
    connection.execute("INSERT INTO tenants VALUES ('acme', 1.0)")
    connection.execute("INSERT INTO api_keys VALUES ('acme', 'k', 'hash', 1.0)")
    connection.execute("INSERT INTO adapters VALUES ('acme', 'tickets', 0, 7, 1, 2, 30, 1.0, 2.0)")
    for number, content in enumerate(contents, 1):
        connection.execute(
            "INSERT INTO versions VALUES ('acme', 'tickets', ?, 'READY', ?, 'lora', 8, 0, 3, '{\"run\": \"7\"}', 1.0)",
            (number, found[content]),
        )
    connection.execute("INSERT INTO promotions VALUES (1, 'acme', 'tickets', 1)")
    connection.commit()
    connection.close()


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A store of version 1: objects, a database of schema 1, and an object without a row."""
    with opened(tmp_path / "made") as made:
        for content in ("one", "two", "orphan"):
            upload(made, content, AdapterKey("acme", content))
    root = tmp_path / "first"
    shutil.copytree(tmp_path / "made" / "objects", root / "objects")
    first_schema(root)
    return root


def test_a_store_of_schema_1_is_migrated_and_loses_nothing(first: Path) -> None:
    before = objects(first)
    for _ in range(2):
        with opened(first) as store:
            adapter = store.adapter(KEY)
            assert (adapter.serving, adapter.canary, adapter.pinned) == (1, Canary(2, 30), True)
            assert [(v.key.number, v.state, v.labels) for v in store.versions(KEY)] == [
                (1, VersionState.READY, {"run": "7"}),
                (2, VersionState.READY, {"run": "7"}),
            ]
            assert all(len(v.program_sha256) == 64 for v in store.versions(KEY))
            assert [key.key for key in store.tenants.keys("acme")] == ["k"]
    assert objects(first) == before
    with opened(first) as store:
        assert upload(store, "three").key.number == 8


def test_a_program_that_is_missing_at_the_migration_is_named_and_the_others_are_there(first: Path) -> None:
    for program in (first / "objects").glob("*/*/program.safetensors"):
        if program.read_text() == "compiled two":
            program.unlink()
    with opened(first) as store:
        states = {v.key.number: (v.state, v.damage) for v in store.versions(KEY)}
        assert states == {1: (VersionState.READY, ""), 2: (VersionState.DAMAGED, "its file is missing")}


def test_a_deleted_version_does_not_come_back_by_a_crash_at_any_moment_of_its_removal(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(root) as store:
        copies: list[Path] = []
        remove = store._objects.remove

        def copy_around(digest: str) -> bool:
            copies.append(copy_of(root, root.parent / f"before-{len(copies)}"))
            gone = remove(digest)
            copies.append(copy_of(root, root.parent / f"after-{len(copies)}"))
            return gone

        monkeypatch.setattr(store._objects, "remove", copy_around)
        store.delete_adapter(KEY)
    assert len(copies) == 4
    for copy in copies:
        with opened(copy) as reopened, pytest.raises(NotFoundError):
            reopened.adapter(KEY)
        assert objects(copy) == set()
