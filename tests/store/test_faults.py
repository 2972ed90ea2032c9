"""Disks that are full, read-only or damaged: reasons of their own, and reads go on."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from deltamux.errors import (
    DeltamuxError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from deltamux.store import AdapterKey, AdapterStore
from deltamux.store.faults import store_error
from deltamux_testing.disks import fill, small_disk
from deltamux_testing.uploads import KEY, objects, opened, upload


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as directory:
        yield directory


def many(store: AdapterStore, count: int) -> list[AdapterKey]:
    keys = [AdapterKey("acme", f"a{number}") for number in range(count)]
    for key in keys:
        upload(store, f"content of {key.adapter} " * 400, key)
    return keys


def test_on_a_full_disk_reading_goes_on_and_deleting_works_and_makes_room(disk: Path) -> None:
    with opened(disk / "store") as store:
        keys = many(store, 12)
        filler = fill(disk)
        for _ in range(3):
            with pytest.raises(ResourceExhaustedError, match="is full: free space") as full:
                upload(store, "new " * 5000)
            assert full.value.reason == "STORE_FULL"
        assert len(store.adapters("acme")) == len(objects(disk / "store")) == 12
        with store.lease(keys[0]) as held:
            assert held.program.read_text().startswith("compiled content of a0")
        for key in keys[:-1]:
            store.delete_adapter(key)
            with pytest.raises(NotFoundError):
                store.adapter(key)
        assert len(objects(disk / "store")) == 1
        filler.unlink()
        assert upload(store, "new").key.number == 1
        assert (disk / "store" / "reserve").stat().st_size > 0


def test_a_tenant_and_its_keys_can_be_deleted_on_a_full_disk(disk: Path) -> None:
    with opened(disk / "store") as store:
        many(store, 6)
        key, secret = store.tenants.create_key("acme")
        fill(disk)
        store.tenants.delete_key("acme", key.key)
        assert store.tenants.verify(secret) is None
        assert len(store.delete_tenant("acme", force=True)) == 6
        assert objects(disk / "store") == set()


def test_a_store_on_a_full_disk_opens_and_is_whole(disk: Path) -> None:
    with opened(disk / "store") as store:
        upload(store, "one")
    filler = fill(disk)
    with opened(disk / "store") as store:
        assert store.adapter(KEY).serving == 1
        store.delete_adapter(KEY)
    filler.unlink()
    with opened(disk / "store") as store:
        assert store.adapters("acme") == []


def test_without_its_reserve_a_full_disk_is_named_when_the_store_opens(disk: Path) -> None:
    AdapterStore.open(disk / "store").close()
    (disk / "store" / "reserve").unlink()
    fill(disk)
    with pytest.raises(ResourceExhaustedError) as full:
        AdapterStore.open(disk / "store")
    assert full.value.reason == "STORE_FULL"


LIMITED = """
import resource, sys
from deltamux.errors import ResourceExhaustedError
from deltamux.store import AdapterStore
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with AdapterStore.open(sys.argv[1]).staging() as staged:
        (staged / "adapter_model.safetensors").write_bytes(bytes(2 << 20))
except ResourceExhaustedError as error:
    print(error.reason)
"""


def test_a_limit_on_file_sizes_counts_as_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "STORE_FULL\n"


def test_a_store_that_cannot_be_written_is_refused_in_a_sentence(disk: Path) -> None:
    with opened(disk / "store") as store:
        upload(store, "one")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for root in (disk / "store", disk / "fresh"):
        with pytest.raises(FailedPreconditionError, match="cannot be written: mount it writable") as refused:
            AdapterStore.open(root)
        assert refused.value.reason == "STORE_READ_ONLY"


def test_a_store_that_becomes_read_only_serves_and_refuses_changes(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        upload(store, "one")
        store._database.execute("PRAGMA query_only = ON")
        for change in (lambda: upload(store, "two"), lambda: store.delete_adapter(KEY), lambda: store.pin(KEY, True)):
            with pytest.raises(DeltamuxError) as refused:
                change()
            assert (refused.value.status, refused.value.reason) == ("UNAVAILABLE", "STORE_READ_ONLY")
        with store.lease(KEY) as held:
            assert held.key.number == 1
        store._database.execute("PRAGMA query_only = OFF")
        assert upload(store, "two").key.number == 2


def moved(root: Path) -> None:
    root.rename(root.with_name("moved"))


def removed(root: Path) -> None:
    shutil.rmtree(root)


def replaced(root: Path) -> None:
    AdapterStore.open(root.with_name("other")).close()
    root.with_name("other").joinpath("db.sqlite3").replace(root / "db.sqlite3")


def without_log(root: Path) -> None:
    (root / "db.sqlite3-wal").unlink()


@pytest.mark.parametrize("harm", [moved, removed, replaced, without_log])
def test_no_change_is_acknowledged_that_a_restart_would_lose(harm: Callable[[Path], None], tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        upload(store, "one")
        upload(store, "two")
        harm(tmp_path / "store")
        for change in (
            lambda: store.promote(KEY, 2),
            lambda: store.pin(KEY, True),
            lambda: store.delete_adapter(KEY),
            lambda: store.tenants.create("globex"),
            lambda: store.tenants.create_key("acme"),
            lambda: upload(store, "three"),
        ):
            with pytest.raises(UnavailableError, match="put it back") as gone:
                change()
            assert gone.value.reason == "STORE_GONE"
        with store.lease(KEY) as held:
            assert held.key.number == 1


def test_a_change_that_waits_for_another_programs_lock_delays_no_other_call(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        upload(store, "one")
        upload(store, "two")
        with closing(sqlite3.connect(tmp_path / "store" / "db.sqlite3", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with ThreadPoolExecutor(1) as threads:
                change = threads.submit(store.promote, KEY, 2)
                time.sleep(0.2)
                began = time.monotonic()
                for _ in range(20):
                    with store.lease(KEY) as held:
                        assert held.key.number == 1
                assert time.monotonic() - began < 1
                assert not change.done()
                other.execute("ROLLBACK")
                assert change.result().serving == 2


@pytest.mark.parametrize("part", ["staging", "objects"])
def test_a_folder_that_was_removed_is_made_again_and_what_was_in_it_is_repaired_by_the_same_upload(
    part: str, tmp_path: Path
) -> None:
    with opened(tmp_path / "store") as store:
        upload(store, "one")
        shutil.rmtree(tmp_path / "store" / part)
        assert upload(store, "two").key.number == 2
        assert upload(store, "one").program.read_text() == "compiled one"


def sqlite_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("as SQLite says it")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("raised", "status", "reason"),
    [
        (OSError(errno.ENOSPC, ""), "RESOURCE_EXHAUSTED", "STORE_FULL"),
        (OSError(errno.EDQUOT, ""), "RESOURCE_EXHAUSTED", "STORE_FULL"),
        (OSError(errno.EROFS, ""), "UNAVAILABLE", "STORE_READ_ONLY"),
        (OSError(errno.EIO, ""), "UNAVAILABLE", "STORE_IO"),
        (sqlite_error(sqlite3.SQLITE_FULL), "RESOURCE_EXHAUSTED", "STORE_FULL"),
        (sqlite_error(sqlite3.SQLITE_READONLY_DBMOVED), "UNAVAILABLE", "STORE_READ_ONLY"),
        (sqlite_error(sqlite3.SQLITE_CORRUPT_INDEX), "UNAVAILABLE", "STORE_CORRUPT"),
        (sqlite_error(sqlite3.SQLITE_NOTADB), "UNAVAILABLE", "STORE_CORRUPT"),
        (sqlite_error(sqlite3.SQLITE_IOERR_READ), "UNAVAILABLE", "STORE_IO"),
        (sqlite_error(sqlite3.SQLITE_BUSY_SNAPSHOT), "UNAVAILABLE", "STORE_BUSY"),
    ],
)
def test_errors_of_the_disk_have_reasons_of_their_own(
    raised: Exception, status: str, reason: str, tmp_path: Path
) -> None:
    error = store_error(raised, tmp_path)
    assert error is not None
    assert (error.status, error.reason) == (status, reason)
    assert str(tmp_path) in error.message
    opening = store_error(raised, tmp_path, opening=True)
    assert isinstance(opening, FailedPreconditionError | ResourceExhaustedError)


@pytest.mark.parametrize("raised", [OSError(errno.ENOENT, ""), ConnectionResetError(), sqlite3.ProgrammingError("x")])
def test_what_is_no_fault_of_the_disk_is_left_alone(raised: Exception, tmp_path: Path) -> None:
    assert store_error(raised, tmp_path) is None
