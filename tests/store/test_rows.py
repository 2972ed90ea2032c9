"""Rows that were damaged by hand: the store opens, reports them, serves the others, and repairs what it can."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path

import pytest

from deltamux.errors import DataLossError, DeltamuxError
from deltamux.store import AdapterKey, AdapterStore, VersionKey
from deltamux.store.backup import backup
from deltamux.store.database import is_id
from deltamux.store.inspection import Kind, inspect
from deltamux_testing.uploads import execute, objects, opened, upload

A, B, OTHER = AdapterKey("acme", "a"), AdapterKey("acme", "b"), AdapterKey("globex", "a")
IT = "WHERE tenant = 'acme' AND adapter = 'a'"
FIRST = f"{IT} AND number = 1"
VERSION, ADAPTER = "tenants/acme/adapters/a/versions/1", "tenants/acme/adapters/a"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A closed store: two adapters of one tenant, of two versions each, and one of another."""
    with opened(tmp_path / "store") as store:
        for key in (A, B, OTHER):
            for content in ("one", "two"):
                upload(store, f"{key} {content}", key)
        store.promote(A, 2)
        store.tenants.create_key("acme")
    return tmp_path / "store"


def walk(store: AdapterStore) -> None:
    """Does everything that callers do with the damaged adapter: every refusal is a DeltamuxError."""

    def lease(key: AdapterKey | VersionKey) -> None:
        with store.lease(key, "request"):
            pass

    for act in (
        lambda: store.adapters("acme"),
        lambda: store.versions(A),
        lambda: lease(A),
        lambda: lease(VersionKey(*A, 1)),
        lambda: store.tenants.page(),
        lambda: store.tenants.keys("acme"),
        store.pinned,
        lambda: store.programs.damaged(),
        lambda: upload(store, f"{A} one", A),
        lambda: upload(store, "new", A),
        lambda: store.promote(A, 1),
        lambda: store.rollback(A),
        lambda: store.delete_version(VersionKey(*A, 1)),
        lambda: store.delete_adapter(A),
        lambda: upload(store, "again", A),
        lambda: store.delete_tenant("acme", force=True),
    ):
        with suppress(DeltamuxError):
            act()


MENDED = {
    "labels that are not JSON": (f"UPDATE versions SET labels = '{{' {FIRST}", VERSION),
    "labels that are a list": (f"UPDATE versions SET labels = '[1]' {FIRST}", VERSION),
    "a label that is a number": (f"UPDATE versions SET labels = '{{\"a\": 1}}' {FIRST}", VERSION),
    "labels that are deep": (f"UPDATE versions SET labels = '{'[' * 100_000}' {FIRST}", VERSION),
    "labels that are bytes": (f"UPDATE versions SET labels = x'ff00' {FIRST}", VERSION),
    "labels that are not UTF-8": (f"UPDATE versions SET labels = CAST(x'7bff7d' AS TEXT) {FIRST}", VERSION),
    "an unknown state": (f"UPDATE versions SET state = 'X' {FIRST}", VERSION),
    "a method that is no text": (f"UPDATE versions SET method = x'ff' {FIRST}", VERSION),
    "a negative rank": (f"UPDATE versions SET rank = -1 {FIRST}", VERSION),
    "a rank of 63 bits": (f"UPDATE versions SET rank = 9223372036854775807 {FIRST}", VERSION),
    "a size that is a fraction": (f"UPDATE versions SET num_bytes = 1.5 {FIRST}", VERSION),
    "a time beyond all calendars": (f"UPDATE versions SET created = 1e300 {FIRST}", VERSION),
    "a time before all calendars": (f"UPDATE versions SET created = -1e12 {FIRST}", VERSION),
    "a time that is text": (f"UPDATE adapters SET updated = 'x' {IT}", ADAPTER),
    "an endless time": (f"UPDATE adapters SET created = 9e999 {IT}", ADAPTER),
    "a tenant's time": ("UPDATE tenants SET created = 'x' WHERE tenant = 'acme'", "tenants/acme"),
    "a serving version that never was": ("INSERT INTO promotions VALUES (99, 'acme', 'a', 77)", ADAPTER),
    "a promotion without a number": (f"UPDATE promotions SET number = 'x' {IT}", ADAPTER),
    "no serving version": (f"DELETE FROM promotions {IT}", ADAPTER),
    "the serving version's row is gone": (f"DELETE FROM versions {IT} AND number = 2", ADAPTER),
    "all versions are gone": (f"DELETE FROM versions {IT}", ADAPTER),
    "a canary that never was": (f"UPDATE adapters SET canary_number = 77, canary_percent = 10 {IT}", ADAPTER),
    "a canary without a share": (f"UPDATE adapters SET canary_number = 1 {IT}", ADAPTER),
    "a share that is text": (f"UPDATE adapters SET canary_number = 1, canary_percent = 'x' {IT}", ADAPTER),
    "a share of 500 percent": (f"UPDATE adapters SET canary_number = 1, canary_percent = 500 {IT}", ADAPTER),
    "half pinned": (f"UPDATE adapters SET pinned = 'x' {IT}", ADAPTER),
    "a last number that is used": (f"UPDATE adapters SET last_number = 0 {IT}", ADAPTER),
    "a last number that is text": (f"UPDATE adapters SET last_number = 'x' {IT}", ADAPTER),
    "no row of the adapter": (f"DELETE FROM adapters {IT}", VERSION),
    "no row of the tenant": ("DELETE FROM tenants WHERE tenant = 'acme'", VERSION),
    "a number that is text": (f"UPDATE versions SET number = 'x' {FIRST}", f"{ADAPTER}/versions/x"),
    "number zero": (f"UPDATE versions SET number = 0 {FIRST}", f"{ADAPTER}/versions/0"),
    "a name that leads elsewhere": (f"UPDATE versions SET adapter = '../x' {FIRST}", "tenants/acme/adapters/../x"),
    "a name that is not UTF-8": ("INSERT INTO tenants VALUES (CAST(x'ff' AS TEXT), 0)", "tenants/\ufffd"),
}  # fmt: skip
KEPT = {
    "a digest that leads elsewhere": (f"UPDATE versions SET digest = '../../../../keep' {FIRST}", VERSION),
    "no digest": (f"UPDATE versions SET digest = '' {FIRST}", VERSION),
    "a digest that is bytes": (f"UPDATE versions SET digest = x'ff' {FIRST}", VERSION),
    "a digest with a zero": (f"UPDATE versions SET digest = 'a' || char(0) || 'b' {FIRST}", VERSION),
}
"""Damage that no statement repairs: the version stays damaged until it is deleted."""


@pytest.mark.parametrize("case", [*MENDED, *KEPT])
def test_a_damaged_row_is_named_and_others_are_served(case: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    script, name = (MENDED | KEPT)[case]
    execute(root, script)
    rows = [finding for finding in inspect(root).of_kind(Kind.ROW_DAMAGED) if finding.versions[0].startswith(name)]
    assert [row.message[:8] for row in rows[:1]] == ["its row "]
    with opened(root) as store:
        assert name in caplog.text
        assert "store check --repair" in caplog.text
        with store.lease(OTHER) as other:
            assert other.program.is_file()
        walk(store)
        assert store.adapter(OTHER).serving == 1


@pytest.mark.parametrize("case", MENDED)
def test_a_damaged_row_is_repaired_and_the_adapter_serves(case: str, root: Path) -> None:
    execute(root, MENDED[case][0])
    with opened(root) as store:
        assert store.rows.repair()
        assert not store.rows.repair()
        if case != "all versions are gone":
            with store.lease(A) as serving:
                assert serving.program.is_file()
        assert upload(store, "new", A).key.number > (0 if case == "all versions are gone" else 2)
    assert not inspect(root).of_kind(Kind.ROW_DAMAGED)


@pytest.mark.parametrize("case", KEPT)
def test_a_version_without_a_digest_is_damaged_until_it_is_deleted(case: str, root: Path) -> None:
    execute(root, KEPT[case][0])
    with opened(root) as store:
        store.rows.repair()
        assert store.version(VersionKey(*A, 1)).state == "DAMAGED"
        store.delete_version(VersionKey(*A, 1))
    assert not inspect(root).of_kind(Kind.ROW_DAMAGED)


@pytest.mark.parametrize("number", [77, None])
def test_an_adapter_without_a_serving_version_in_its_rows_is_refused_by_name_until_one_is_promoted(
    number: int | None, root: Path
) -> None:
    execute(root, f"DELETE FROM promotions {IT}")
    if number:
        execute(root, f"INSERT INTO promotions VALUES (99, 'acme', 'a', {number})")
    with opened(root) as store:
        with pytest.raises(DataLossError, match="Promote a version") as lost, store.lease(A):
            pass
        assert (lost.value.reason, lost.value.metadata) == ("ROW_DAMAGED", {"name": str(A)})
        store.promote(A, 1)
        with store.lease(A) as serving:
            assert serving.key.number == 1


@pytest.mark.parametrize("digest", ["''", "'..'", "'../../..'", "'.'", "x'ff'", "7"])
@pytest.mark.parametrize("table", ["garbage", "versions"])
def test_no_row_makes_the_store_remove_anything_but_the_object_of_a_digest(table: str, digest: str, root: Path) -> None:
    keep = root.parent / "keep"
    keep.write_text("kept")
    execute(
        root,
        f"INSERT INTO garbage VALUES ({digest})"
        if table == "garbage"
        else f"UPDATE versions SET state = 'DRAINING', digest = {digest} {FIRST}",
    )
    before = objects(root)
    with opened(root) as store:
        assert objects(root) == before
        assert upload(store, "new", B).program.is_file()
        assert {path.name for path in root.parent.iterdir()} == {"keep", "store"}


@pytest.mark.parametrize("case", KEPT)
def test_a_backup_of_a_damaged_row_stays_within_its_directory(case: str, root: Path) -> None:
    execute(root, KEPT[case][0])
    backup(root, root.parent / "backup")
    assert {path.name for path in root.parent.iterdir()} == {"store", "backup"}
    assert len(objects(root.parent / "backup")) == 5


@pytest.mark.parametrize(
    ("value", "holds"),
    [
        *((value, True) for value in ("a", "7", "a.b_c-9", "a" * 63)),
        *((value, False) for value in ("a" * 64, "", "-a", "a-", "A", "ä", "a b", "a\0b", "a/b", "a\n", b"a", 7)),
    ],
)
def test_sql_and_the_server_agree_on_what_an_id_is(value: object, holds: bool) -> None:
    from deltamux.server.rpc import names

    found = sqlite3.connect(":memory:").execute(f"SELECT {is_id('x')} FROM (SELECT ? AS x)", [value]).fetchone()
    assert bool(found[0]) is holds
    assert (isinstance(value, str) and names.is_id(value)) is holds
