"""The store: versions, aliases, leases, recovery."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from deltamux.errors import FailedPreconditionError, NotFoundError
from deltamux.store import AdapterKey, AdapterStore, VersionKey
from deltamux_testing.uploads import KEY, objects, opened, staged_upload, upload


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[AdapterStore]:
    with opened(root) as store:
        yield store


def test_a_first_version_serves_at_once_and_a_later_one_when_promoted(store: AdapterStore) -> None:
    assert upload(store, "one").key.number == 1
    assert upload(store, "two").key.number == 2
    assert store.adapter(KEY).serving == 1
    assert store.promote(KEY, 2).serving == 2
    assert store.rollback(KEY).serving == 1
    assert upload(store, "three", promote=True).key.number == 3
    assert store.adapter(KEY).serving == 3


def test_the_same_content_is_the_same_version(store: AdapterStore) -> None:
    first = upload(store, "one")
    upload(store, "two")
    assert upload(store, "one") == first


def test_labels_that_come_with_the_same_content_replace_those_of_the_version_and_none_leave_them(
    store: AdapterStore,
) -> None:
    for given, kept in (
        ({"stage": "test"}, {"stage": "test"}),
        ({}, {"stage": "test"}),
        ({"owner": "a"}, {"owner": "a"}),
    ):
        with store.staging() as staged:
            record = store.commit(staged, KEY, staged_upload(staged, "one"), labels=given)
        assert (record.key.number, record.labels) == (1, kept)
        assert store.version(record.key).labels == kept


def test_equal_content_of_two_tenants_is_stored_once_and_kept_until_both_are_removed(
    store: AdapterStore, root: Path
) -> None:
    other = AdapterKey("globex", "tickets")
    upload(store, "same")
    record = upload(store, "same", other)
    store.delete_adapter(KEY)
    assert objects(root) == {record.compiled.digest}
    store.delete_adapter(other)
    assert objects(root) == set()


def test_a_leased_version_is_kept_after_its_deletion(store: AdapterStore, root: Path) -> None:
    removed: list[tuple[VersionKey, bool]] = []
    store.on_removed = lambda record, last: removed.append((record.key, last))
    upload(store, "one")
    with store.lease(KEY) as held:
        store.delete_adapter(KEY)
        with pytest.raises(NotFoundError):
            store.adapter(KEY)
        with pytest.raises(NotFoundError), store.lease(held.key):
            pass
        assert held.program.read_text() == "compiled one"
        assert removed == []
    assert removed == [(held.key, True)]
    assert objects(root) == set()


async def test_on_an_event_loop_a_released_version_is_removed_by_a_thread(root: Path) -> None:
    with opened(root) as store:
        threads: list[str] = []
        store.on_removed = lambda record, last: threads.append(threading.current_thread().name)
        upload(store, "one")
        with store._objects_lock, store.lease(KEY):  # something is being moved, by whoever it may be
            await asyncio.to_thread(store.delete_adapter, KEY)
    assert [name.startswith("deltamux-removal") for name in threads] == [True]
    assert objects(root) == set()


def test_numbers_are_never_used_again(store: AdapterStore) -> None:
    upload(store, "one")
    store.delete_adapter(KEY)
    assert upload(store, "one").key.number == 2


def test_a_serving_version_is_not_deleted(store: AdapterStore) -> None:
    upload(store, "one")
    upload(store, "two")
    with pytest.raises(FailedPreconditionError, match="serves traffic"):
        store.delete_version(VersionKey(*KEY, 1))
    store.delete_version(VersionKey(*KEY, 2))
    assert [version.key.number for version in store.versions(KEY)] == [1]


def test_a_rollback_skips_what_was_deleted(store: AdapterStore) -> None:
    for content in ("one", "two", "three"):
        upload(store, content, promote=True)
    store.delete_version(VersionKey(*KEY, 2))
    assert store.rollback(KEY).serving == 1
    with pytest.raises(FailedPreconditionError, match="no earlier version"):
        store.rollback(KEY)


@pytest.mark.parametrize(("promoted", "deleted", "returns_to"), [((2, 3, 2), 3, 1), ((2, 1, 2, 1), 2, None)])
def test_a_rollback_returns_to_another_version_also_where_the_one_between_was_deleted(
    promoted: tuple[int, ...], deleted: int, returns_to: int | None, store: AdapterStore
) -> None:
    for content in ("one", "two", "three"):
        upload(store, content)
    for number in promoted:
        store.promote(KEY, number)
    store.delete_version(VersionKey(*KEY, deleted))
    assert store.adapter(KEY).previous == returns_to
    if returns_to is None:
        with pytest.raises(FailedPreconditionError, match="no earlier version"):
            store.rollback(KEY)
        return
    rolled = store.rollback(KEY)
    assert (rolled.serving, rolled.previous) == (returns_to, None)
    with store.lease(KEY) as held:
        assert held.key.number == returns_to


def test_no_call_waits_for_a_change_that_waits_for_the_disk(store: AdapterStore) -> None:
    upload(store, "one")
    upload(store, "two")
    _, secret = store.tenants.create_key("acme")
    begun, ends = threading.Event(), threading.Event()

    def change() -> None:
        with store._database.transaction():
            store._adapter_rows.promote(KEY, 2)
            begun.set()
            ends.wait(10)  # as for a disk that takes long to make it durable

    def serves() -> list[object]:
        """What the event loop does for requests and uploads."""
        with store.lease(KEY) as held, store.lease(VersionKey(*KEY, 2)) as other, store.staging():
            return [held.key.number, other.key.number, store.tenants.verify(secret), store.adapter(KEY).serving]

    with ThreadPoolExecutor(2) as threads:
        changing = threads.submit(change)
        assert begun.wait(10)
        try:
            assert threads.submit(serves).result(5) == [1, 2, "acme", 1]
        finally:
            ends.set()
        changing.result()
    assert store.adapter(KEY).serving == 2


@pytest.mark.slow
def test_what_a_request_holds_is_there_whatever_is_promoted_and_deleted_meanwhile(store: AdapterStore) -> None:
    upload(store, "0")
    stop = threading.Event()

    def hold(by_version: bool) -> int:
        count = 0
        while not stop.is_set():
            key = VersionKey(*KEY, store.adapter(KEY).serving) if by_version else KEY
            with suppress(NotFoundError), store.lease(key) as held:  # its version may go before it is held
                assert held.program.read_text().startswith("compiled ")
                count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        holding = [threads.submit(hold, by_version) for by_version in (False, True) * 2]
        for number in range(1, 30):
            record = upload(store, str(number), promote=True)
            with store.lease(KEY) as held:
                assert held.key == record.key  # what was acknowledged is what serves
            store.delete_version(VersionKey(*KEY, number))
        stop.set()
        assert all(done.result() for done in holding)
    assert len(objects(store.root)) == 1


def test_a_canary_splits_by_request_and_the_same_request_decides_alike(store: AdapterStore) -> None:
    upload(store, "one")
    upload(store, "two")
    store.promote(KEY, 2, canary_percent=30)

    def served(request: str) -> int:
        with store.lease(KEY, request) as record:
            return record.key.number

    counts = [served(f"request {i}") for i in range(400)]
    assert 60 < counts.count(2) < 180
    assert counts == [served(f"request {i}") for i in range(400)]


def test_a_version_that_serves_cannot_be_its_own_canary(store: AdapterStore) -> None:
    upload(store, "one")
    with pytest.raises(FailedPreconditionError, match="serves already") as refused:
        store.promote(KEY, 1, canary_percent=30)
    assert refused.value.reason == "ALREADY_SERVING"
    assert store.adapter(KEY).canary is None


def test_everything_is_kept_after_reopening_and_interrupted_uploads_are_removed(root: Path) -> None:
    with opened(root) as store:
        record = upload(store, "one")
    (root / "staging" / "half-written").mkdir()
    with opened(root) as store:
        assert store.version(record.key) == record
        assert objects(root) == {record.compiled.digest}
        assert list((root / "staging").iterdir()) == []


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("lock_file", ["kept", "removed"])
@pytest.mark.usefixtures("store")
def test_a_second_process_is_refused_also_after_the_lock_file_was_removed(lock_file: str, root: Path) -> None:
    if lock_file == "removed":
        (root / "lock").unlink()
    code = "import sys; from deltamux.store import AdapterStore; AdapterStore.open(sys.argv[1])"
    second = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False)
    assert second.returncode != 0
    assert "in use by another process" in second.stderr


@pytest.mark.slow
def test_ten_thousand_adapters_are_listed_page_by_page(store: AdapterStore) -> None:
    record = upload(store, "one")
    with store._database.transaction():
        for number in range(10_000):
            store._adapter_rows.add_version(AdapterKey("many", f"a{number:05}"), record.compiled, {})
            store._adapter_rows.promote(AdapterKey("many", f"a{number:05}"), 1)
    seen: list[str] = []
    while page := store.adapters("many", after=seen[-1] if seen else "", limit=1000):
        seen += [adapter.key.adapter for adapter in page]
    assert seen == [f"a{number:05}" for number in range(10_000)]
    with store.lease(AdapterKey("many", "a07777")) as held:
        assert held.compiled == record.compiled


def test_uploads_of_others_come_between_those_versions_of_a_large_tenant_that_are_removed(store: AdapterStore) -> None:
    record = upload(store, "one")
    with store._database.transaction():
        for number in range(2000):
            store._adapter_rows.add_version(AdapterKey("many", f"a{number:04}"), record.compiled, {})
    begun = threading.Event()
    store.on_removed = lambda record, last: begun.set()
    with ThreadPoolExecutor(1) as threads:
        deleting = threads.submit(store.delete_tenant, "many", force=True)
        assert begun.wait(30)
        upload(store, "two")
        left = store._database.fetch_one("SELECT count(*) FROM versions WHERE tenant = 'many'")[0]
        assert left > 0
        assert len(deleting.result()) == 2000
    assert store._database.fetch_one("SELECT count(*) FROM versions WHERE tenant = 'many'")[0] == 0


def test_a_key_opens_its_tenant_until_it_is_revoked(store: AdapterStore) -> None:
    store.tenants.create("acme")
    record, secret = store.tenants.create_key("acme")
    assert store.tenants.verify(secret) == "acme"
    assert store.tenants.verify(secret + "x") is None
    assert secret not in (store._database.fetch_one("SELECT secret_hash FROM api_keys")["secret_hash"])
    store.tenants.delete_key("acme", record.key)
    assert store.tenants.verify(secret) is None
