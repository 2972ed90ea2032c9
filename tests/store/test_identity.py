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
from deltamux_testing.uploads import KEY, copy_of, objects, upload


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A closed store with two versions, and a copy of its database from before the second."""
    root = tmp_path / "store"
    store = AdapterStore.open(root)
    upload(store, "one")
    store.close()
    shutil.copy(root / "db.sqlite3", tmp_path / "older.sqlite3")
    store = AdapterStore.open(root)
    upload(store, "two")
    store.close()
    return root


def missing(root: Path) -> None:
    (root / "db.sqlite3").unlink()


def missing_with_its_log(root: Path) -> None:
    missing(root)
    (root / "db.sqlite3-wal").write_bytes(b"\0" * 4096)


def empty(root: Path) -> None:
    (root / "db.sqlite3").write_bytes(b"")


def blank(root: Path) -> None:
    missing(root)
    connection = sqlite3.connect(root / "db.sqlite3")
    connection.execute("VACUUM")
    connection.close()


def older(root: Path) -> None:
    shutil.copy(root.parent / "older.sqlite3", root / "db.sqlite3")


def older_of_schema_1(root: Path) -> None:
    missing(root)
    first_schema(root)


def of_another_store(root: Path) -> None:
    other = AdapterStore.open(root.parent / "other")
    for content in "abcdef":
        upload(other, content)
    other.close()
    shutil.copy(root.parent / "other" / "db.sqlite3", root / "db.sqlite3")


def without_identity_file(root: Path) -> None:
    (root / "store.json").unlink()


def identity_file_damaged(root: Path) -> None:
    (root / "store.json").write_text('{"format": ')


def header_damaged(root: Path) -> None:
    with (root / "db.sqlite3").open("r+b") as file:
        file.write(b"no database here")


def page_damaged(root: Path) -> None:
    with (root / "db.sqlite3").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8192)


def without_a_table(root: Path) -> None:
    sql(root, "DROP TABLE promotions")


def without_a_column(root: Path) -> None:
    sql(root, "ALTER TABLE versions DROP COLUMN labels")


def without_its_identity(root: Path) -> None:
    sql(root, "DELETE FROM identity")


def with_an_identity_of_text(root: Path) -> None:
    sql(root, "UPDATE identity SET generation = 'x'")


def with_two_identities(root: Path) -> None:
    sql(root, "INSERT INTO identity SELECT * FROM identity")


def of_a_negative_schema(root: Path) -> None:
    sql(root, "PRAGMA user_version = -1")


def with_a_folder_for_identity_file(root: Path) -> None:
    (root / "store.json").unlink()
    (root / "store.json").mkdir()


def with_a_pipe_for_identity_file(root: Path) -> None:
    (root / "store.json").unlink()
    os.mkfifo(root / "store.json")


def with_a_deep_identity_file(root: Path) -> None:
    (root / "store.json").write_text("[" * 200_000)


def with_a_trigger(root: Path) -> None:
    sql(root, "CREATE TRIGGER t AFTER UPDATE ON identity BEGIN DELETE FROM versions; END")


def with_a_view(root: Path) -> None:
    sql(root, "CREATE VIEW v AS SELECT * FROM versions")


def of_another_program(root: Path) -> None:
    missing(root)
    sql(root, "CREATE TABLE bookmarks (url TEXT)")


def newer(root: Path) -> None:
    sql(root, "PRAGMA user_version = 99")


def sql(root: Path, statement: str) -> None:
    connection = sqlite3.connect(root / "db.sqlite3")
    connection.executescript(statement)
    connection.close()


@pytest.mark.parametrize(
    ("harm", "reason", "words"),
    [
        (missing, "STORE_MISMATCH", "is missing"),
        (missing_with_its_log, "STORE_MISMATCH", "is missing"),
        (empty, "STORE_MISMATCH", "is empty"),
        (blank, "STORE_MISMATCH", "is empty"),
        (older, "STORE_OUTDATED", "older copy"),
        (older_of_schema_1, "STORE_OUTDATED", "older copy"),
        (of_another_store, "STORE_MISMATCH", "the objects are of store"),
        (without_identity_file, "STORE_MISMATCH", "store.json next to it is missing"),
        (identity_file_damaged, "STORE_CORRUPT", "store.json is damaged"),
        (with_a_pipe_for_identity_file, "STORE_PATH", "not a regular file"),
        (with_a_deep_identity_file, "STORE_CORRUPT", "store.json is damaged"),
        (with_a_trigger, "STORE_CORRUPT", "store restore"),
        (with_a_view, "STORE_CORRUPT", "store restore"),
        (of_another_program, "STORE_MISMATCH", "not of deltamux"),
        (header_damaged, "STORE_CORRUPT", "store restore"),
        (page_damaged, "STORE_CORRUPT", "store restore"),
        (without_a_table, "STORE_CORRUPT", "store restore"),
        (without_a_column, "STORE_CORRUPT", "store restore"),
        (without_its_identity, "STORE_CORRUPT", "store restore"),
        (with_an_identity_of_text, "STORE_CORRUPT", "store restore"),
        (with_two_identities, "STORE_CORRUPT", "store restore"),
        (of_a_negative_schema, "STORE_CORRUPT", "store restore"),
        (with_a_folder_for_identity_file, "STORE_PATH", "Is a directory"),
        (newer, "STORE_SCHEMA", "start the one that wrote it"),
    ],
)
def test_a_database_that_does_not_belong_is_refused_and_nothing_is_deleted(
    harm: Callable[[Path], None], reason: str, words: str, root: Path
) -> None:
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


@pytest.mark.parametrize("harm", [missing, empty, older, older_of_schema_1, of_another_store, without_identity_file])
def test_a_loss_that_is_accepted_lets_the_store_open_and_deletes_no_object(
    harm: Callable[[Path], None], root: Path
) -> None:
    before = objects(root)
    harm(root)
    AdapterStore.open(root, adopt=True).close()
    store = AdapterStore.open(root)
    upload(store, "three")
    store.close()
    assert objects(root) > before


def test_a_store_without_objects_is_refused_too_when_its_database_is_missing(tmp_path: Path) -> None:
    store = AdapterStore.open(tmp_path)
    store.tenants.create("acme")
    store.close()
    missing(tmp_path)
    with pytest.raises(FailedPreconditionError, match="is missing"):
        AdapterStore.open(tmp_path)


def test_an_older_copy_made_while_the_store_was_open_is_noticed_too(tmp_path: Path) -> None:
    store = AdapterStore.open(tmp_path / "store")
    upload(store, "one")
    copy = copy_of(tmp_path / "store", tmp_path / "copy")
    store.tenants.create("revoked")
    store.close()
    for name in ("db.sqlite3", "db.sqlite3-wal"):
        shutil.copy(copy / name, tmp_path / "store" / name)
    with pytest.raises(FailedPreconditionError, match="older copy"):
        AdapterStore.open(tmp_path / "store")


def test_a_crash_before_the_identity_or_the_generation_is_written_is_no_mismatch(tmp_path: Path) -> None:
    store = AdapterStore.open(tmp_path)
    sql(tmp_path, "UPDATE identity SET generation = 0")
    (tmp_path / "store.json").unlink()
    (tmp_path / "generation").unlink()
    store.close()
    store = AdapterStore.open(tmp_path)
    upload(store, "one")
    store.close()
    (tmp_path / "generation").write_text("")  # as a power cut may leave it
    store = AdapterStore.open(tmp_path)
    assert store.adapter(KEY).serving == 1
    store.close()


def killed(root: Path, content: str) -> Path:
    """Returns a store as a kill -9 leaves it, its last changes in SQLite's log."""
    store = AdapterStore.open(root)
    upload(store, content)
    copy = copy_of(root, root.with_name(f"{root.name}-killed"))
    store.close()
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
    store = AdapterStore.open(one)
    assert [version.key.number for version in store.versions(KEY)] == [1]
    store.close()


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
    store = AdapterStore.open(root)
    before = objects(root)
    put = store._objects.put
    copies: list[Path] = []

    def put_and_copy(staged: Path, digest: str, *, keep_program: bool = False) -> None:
        put(staged, digest, keep_program=keep_program)
        copies.append(copy_of(root, root.parent / "crashed"))

    monkeypatch.setattr(store._objects, "put", put_and_copy)
    upload(store, "three")
    store.close()
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
    made = AdapterStore.open(tmp_path / "made")
    for content in ("one", "two", "orphan"):
        upload(made, content, AdapterKey("acme", content))
    made.close()
    root = tmp_path / "first"
    shutil.copytree(tmp_path / "made" / "objects", root / "objects")
    first_schema(root)
    return root


def test_a_store_of_schema_1_is_migrated_and_loses_nothing(first: Path) -> None:
    before = objects(first)
    for _ in range(2):
        store = AdapterStore.open(first)
        adapter = store.adapter(KEY)
        assert (adapter.serving, adapter.canary, adapter.pinned) == (1, Canary(2, 30), True)
        assert [(v.key.number, v.state, v.labels) for v in store.versions(KEY)] == [
            (1, VersionState.READY, {"run": "7"}),
            (2, VersionState.READY, {"run": "7"}),
        ]
        assert all(len(v.program_sha256) == 64 for v in store.versions(KEY))
        assert [key.key for key in store.tenants.keys("acme")] == ["k"]
        store.close()
    assert objects(first) == before
    store = AdapterStore.open(first)
    assert upload(store, "three").key.number == 8
    store.close()


def test_a_program_that_is_missing_at_the_migration_is_named_and_the_others_are_there(first: Path) -> None:
    for program in (first / "objects").glob("*/*/program.safetensors"):
        if program.read_text() == "compiled two":
            program.unlink()
    store = AdapterStore.open(first)
    states = {v.key.number: (v.state, v.damage) for v in store.versions(KEY)}
    assert states == {1: (VersionState.READY, ""), 2: (VersionState.DAMAGED, "its file is missing")}
    store.close()


def test_a_deleted_version_does_not_come_back_by_a_crash_at_any_moment_of_its_removal(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore.open(root)
    copies: list[Path] = []
    remove = store._objects.remove

    def copy_around(digest: str) -> bool:
        copies.append(copy_of(root, root.parent / f"before-{len(copies)}"))
        gone = remove(digest)
        copies.append(copy_of(root, root.parent / f"after-{len(copies)}"))
        return gone

    monkeypatch.setattr(store._objects, "remove", copy_around)
    store.delete_adapter(KEY)
    store.close()
    assert len(copies) == 4
    for copy in copies:
        reopened = AdapterStore.open(copy)
        with pytest.raises(NotFoundError):
            reopened.adapter(KEY)
        reopened.close()
        assert objects(copy) == set()
