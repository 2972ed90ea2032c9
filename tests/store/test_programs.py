"""Stored programs: damage is found and named, the same files repair it for all versions, a program is for one base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltamux.errors import DataLossError, DeltamuxError
from deltamux.store import AdapterKey, AdapterStore, VersionState
from deltamux.store.objects import file_sum
from deltamux_testing.disks import flip, truncate
from deltamux_testing.uploads import KEY, opened, staged_upload, upload

OTHER = AdapterKey("globex", "mails")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with opened(tmp_path / "store") as store:
        yield store


def remove_object(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink, remove_object])
def test_the_same_files_repair_a_program_for_every_version_that_has_them(
    harm: Callable[[Path], None], store: AdapterStore
) -> None:
    first, second = upload(store, "same"), upload(store, "same", OTHER)
    good = upload(store, "good")
    harm(first.program)
    store.programs.mark_damaged(first, "its file is damaged")
    assert [v.state for v in store.versions(KEY)] == [VersionState.DAMAGED, VersionState.READY]
    with store.lease(OTHER) as held:
        assert (held.state, held.damage) == (VersionState.DAMAGED, "its file is damaged")
    again = upload(store, "same", AdapterKey("initech", "third"))
    assert again.key.number == 1
    for key, number in ((KEY, first.key), (OTHER, second.key)):
        with store.lease(key) as held:
            assert (held.key, held.state) == (number, VersionState.READY)
            assert held.program.read_text() == "compiled same"
            assert file_sum(held.program) == held.program_sha256
    assert store.version(good.key).program.read_text() == "compiled good"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_the_same_files_repair_the_stored_upload(harm: Callable[[Path], None], name: str, store: AdapterStore) -> None:
    record = upload(store, "one")
    harm(record.program.parent / name)
    with pytest.raises(DataLossError, match="upload the same files again") as lost:
        store.programs.checked_upload(record)
    assert lost.value.reason == "UPLOAD_DAMAGED"
    assert upload(store, "one").key == record.key
    assert (store.programs.checked_upload(record) / name).read_text() == "one"


def test_a_whole_object_is_left_as_it_is(store: AdapterStore) -> None:
    record = upload(store, "one")
    inode = record.program.stat().st_ino
    upload(store, "one", OTHER)
    assert record.program.stat().st_ino == inode


def test_a_mark_of_a_program_that_was_replaced_meanwhile_is_not_set(store: AdapterStore) -> None:
    before = upload(store, "one", base="a")
    after = upload(store, "one", base="b")
    assert before.program_sha256 != after.program_sha256
    store.programs.mark_damaged(before, "its file is damaged")
    assert store.version(before.key).state is VersionState.READY


def test_damage_is_remembered_and_forgotten(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        record = upload(store, "one")
        store.programs.mark_damaged(record, "its file is missing")
    with opened(tmp_path / "store") as store:
        assert store.version(record.key).damage == "its file is missing"
        store.programs.clear_damage(record)
        assert store.version(record.key).state is VersionState.READY


def test_a_program_belongs_to_the_base_that_it_was_compiled_for(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        unknown, mine, other = upload(store, "0"), upload(store, "1", base="aa"), upload(store, "2", base="bb")
        assert store.programs.set_base("aa") == 1
        assert [store.programs.is_of_another_base(v) for v in (unknown, mine, other)] == [False, False, True]
        assert store.programs.set_base("") == 0
        assert not store.programs.is_of_another_base(other)
    assert '"base_fingerprint": "aa"' in (tmp_path / "store" / "store.json").read_text()


def test_an_upload_on_another_base_brings_a_program_for_it(store: AdapterStore) -> None:
    record = upload(store, "one", base="aa")
    assert upload(store, "one", OTHER, base="bb").key == (*OTHER, 1)
    record = store.version(record.key)
    assert record.compiled.base_fingerprint == "bb"
    assert record.program.read_text() == "compiled one for bb"


def test_a_replaced_program_has_the_same_number_and_its_own_checksum(store: AdapterStore) -> None:
    record = upload(store, "one", base="aa")
    with store.staging() as staged:
        store.programs.replace(staged, staged_upload(staged, "one", "bb"))
    now = store.version(record.key)
    assert (now.key, now.compiled.base_fingerprint) == (record.key, "bb")
    assert file_sum(now.program) == now.program_sha256
    store.delete_adapter(KEY)
    with store.staging() as staged:
        store.programs.replace(staged, staged_upload(staged, "one", "cc"))
    assert not record.program.exists()


def test_the_files_of_a_failed_commit_are_removed(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stored: object) -> None:
        raise DeltamuxError("no")

    monkeypatch.setattr(store._staged_uploads, "record", fail)
    with pytest.raises(DeltamuxError, match="no"):
        upload(store, "one")
    assert list((store.root / "objects").glob("*/*")) == []
    assert store.adapters("acme") == []
