"""`deltamux store`: what it finds is printed and is its exit status, and all damage can be repaired."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from deltamux.cli import main
from deltamux.errors import FailedPreconditionError
from deltamux.store import AdapterKey, AdapterStore
from deltamux.store.lock import Lock
from deltamux_testing.disks import fill, small_disk
from deltamux_testing.uploads import KEY, copy_of, execute, objects, opened, upload


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A closed store: one content that two tenants share, and another."""
    root = tmp_path / "store"
    with opened(root) as store:
        upload(store, "one")
        upload(store, "one", AdapterKey("globex", "mails"))
        upload(store, "two")
    return root


def program(root: Path, content: str) -> Path:
    return next(p for p in (root / "objects").glob("*/*/*.safetensors") if p.read_text() == f"compiled {content}")


def flip_program(root: Path) -> None:
    path = program(root, "one")
    path.write_text("compilee one")


def remove_program(root: Path) -> None:
    program(root, "one").unlink()


def remove_object(root: Path) -> None:
    shutil.rmtree(program(root, "one").parent)


def flip_upload(root: Path) -> None:
    (program(root, "one").parent / "adapter_model.safetensors").write_text("onf")


def add_orphan(root: Path) -> None:
    (root / "objects" / "ab" / ("ab" * 32)).mkdir(parents=True)


def check(root: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, list[str]]]:
    status = main(["store", "check", str(root), "--json", *options])
    found = json.loads(capsys.readouterr().out)["findings"]
    return status, {finding["kind"]: finding["versions"] for finding in found}


ONE = ["tenants/acme/adapters/tickets/versions/1", "tenants/globex/adapters/mails/versions/1"]


def test_a_check_of_an_undamaged_store_finds_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = copy_of(root, root.parent / "before")
    assert main(["store", "check", str(root)]) == 0
    assert "3 versions of 2 contents, no problems" in capsys.readouterr().out
    for path in before.rglob("*"):
        if path.is_file():
            assert (root / path.relative_to(before)).read_bytes() == path.read_bytes(), "a check changes nothing"


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (flip_program, {"PROGRAM_DAMAGED": ONE}),
        (remove_program, {"PROGRAM_MISSING": ONE}),
        (remove_object, {"PROGRAM_MISSING": ONE, "UPLOAD_DAMAGED": ONE}),
        (flip_upload, {"UPLOAD_DAMAGED": ONE}),
        (add_orphan, {"ORPHAN": []}),
    ],
)
@pytest.mark.parametrize("in_use", [False, True])
def test_damage_of_every_kind_is_found_also_while_the_store_is_in_use(
    in_use: bool,
    harm: Callable[[Path], None],
    expected: dict[str, list[str]],
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(root)
    store = AdapterStore.open(root) if in_use else None
    assert check(root, capsys) == (1, expected)
    assert main(["store", "check", str(root)]) == 1
    output = capsys.readouterr().out
    assert all(kind in output and all(name in output for name in names) for kind, names in expected.items())
    if store is not None:
        store.close()


NO_FILE: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize(
    ("kind", "above"), [("pipe", 0), ("folder", 0), ("loop", 0), ("file", 1), ("file", 2)], ids=str
)
def test_what_is_not_a_file_is_damage_of_its_object_alone_and_repaired_by_the_same_upload(
    kind: str, above: int, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = program(root, "one")
    place = [path, *path.parents][above]
    shutil.rmtree(place) if above else place.unlink()
    NO_FILE.get(kind, Path.touch)(place)
    status, found = check(root, capsys)
    assert status == 1
    assert set(map(tuple, found.values())) == {tuple(ONE)}
    assert main(["store", "backup", str(root), str(tmp_path / "backup")]) == 1
    assert main(["store", "check", str(tmp_path / "backup")]) == 1
    with opened(root) as store:
        upload(store, "one")
    capsys.readouterr()
    assert check(root, capsys) == (0, {})


@pytest.mark.parametrize("kind", NO_FILE)
def test_what_is_not_a_file_among_an_objects_files_is_left_out_of_a_backup(
    kind: str, root: Path, tmp_path: Path
) -> None:
    NO_FILE[kind](program(root, "one").parent / "README.md")
    assert main(["store", "backup", str(root), str(tmp_path / "backup")]) == 0
    assert main(["store", "restore", str(tmp_path / "backup"), str(tmp_path / "restored")]) == 0
    assert not list((tmp_path / "restored").rglob("README.md"))


def test_damaged_rows_are_repaired_and_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(root, "UPDATE versions SET labels = '{' WHERE tenant = 'globex'")
    assert check(root, capsys) == (1, {"ROW_DAMAGED": ONE[1:]})
    assert main(["store", "check", str(root), "--repair"]) == 0
    assert f"the row of {ONE[1]} has labels that are not a JSON object" in capsys.readouterr().out
    assert check(root, capsys) == (0, {})


def test_a_name_that_is_too_long_for_a_backup_is_refused_in_a_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "backup", str(root), str(tmp_path / ("n" * 300))]) == 1
    assert "STORE_PATH" in capsys.readouterr().err


def test_a_backup_clears_away_what_one_to_the_same_place_has_left_that_was_killed_and_nothing_else(
    root: Path, tmp_path: Path
) -> None:
    for name in (".backup.0123abcd", ".backup.held1234", ".backup.0123abce", ".other.0123abcd"):
        (tmp_path / name / "objects").mkdir(parents=True)
    with Lock() as held:
        held.acquire(tmp_path / ".backup.0123abce", os.O_RDONLY)
        assert main(["store", "backup", str(root), str(tmp_path / "backup")]) == 0
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert left == {".backup.held1234", ".backup.0123abce", ".other.0123abcd"}


@pytest.mark.parametrize("command", ["backup", "restore"])
@pytest.mark.parametrize("leave", [16384, 2 << 20], ids=["room-for-a-part-of-the-database", "room-for-the-database"])
def test_a_copy_to_a_full_disk_names_that_disk_and_leaves_nothing(
    command: str, leave: int, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(root) as store:
        upload(store, "large " * 800_000)
    with small_disk(tmp_path / "disk", 4) as disk:
        fill(disk, leave=leave)
        before = set(disk.rglob("*"))
        assert main(["store", command, str(root), str(disk / "copy")]) == 1
        output = capsys.readouterr().err
        assert str(disk) in output
        assert str(root) not in output
        assert "delete adapters" not in output
        assert "STORE_FULL" in output
        assert set(disk.rglob("*")) - before <= {disk / "copy", disk / "copy" / "lock"}


def test_a_store_that_was_killed_is_checked_as_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(root) as store:
        upload(store, "three")
        killed = copy_of(root, root.parent / "killed")
    assert main(["store", "check", str(killed)]) == 0
    assert "4 versions of 3 contents" in capsys.readouterr().out


def test_a_long_check_prints_its_progress(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltamux.store import inspection

    names = {f"{number:064}": (f"tenants/t/adapters/a/versions/{number}",) for number in range(2001)}
    of = inspection.Snapshot.of.__func__  # type: ignore[attr-defined]  # a class method's function
    monkeypatch.setattr(
        inspection.Snapshot,
        "of",
        classmethod(lambda cls, connection: dataclasses.replace(of(cls, connection), versions=names)),
    )
    assert main(["store", "check", str(root)]) == 1
    assert capsys.readouterr().err.splitlines() == ["checked 1000 of 2001", "checked 2000 of 2001"]


def test_an_uploads_files_are_put_back(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "upload"
    directory.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).write_text("one")
    flip_upload(root)
    assert check(root, capsys, "--repair", str(directory)) == (0, {})
    remove_object(root)
    status, found = check(root, capsys, "--repair", str(directory))
    assert (status, found) == (1, {"PROGRAM_MISSING": ONE})
    with opened(root) as store:
        assert store.versions(KEY)[0].damage == "its file is missing"
        upload(store, "one")
    assert check(root, capsys) == (0, {})


def test_what_is_no_upload_is_refused_and_an_unknown_one_is_reported(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "check", str(root), "--repair", str(tmp_path)]) == 1
    assert "is not an upload" in capsys.readouterr().err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("unknown")
    assert main(["store", "check", str(root), "--repair", str(tmp_path)]) == 0
    assert "no version has these files" in capsys.readouterr().out


def test_orphans_are_removed_when_that_is_confirmed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_orphan(root)
    before = objects(root)
    assert main(["store", "gc", str(root)]) == 0
    assert "1 object that no version refers to" in capsys.readouterr().out
    assert objects(root) == before
    assert main(["store", "gc", str(root), "--yes"]) == 0
    assert objects(root) == before - {"ab" * 32}
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert check(root, capsys) == (0, {})


@pytest.mark.parametrize("state", ["missing", "empty"])
def test_without_its_database_a_store_is_refused_and_adopted_with_the_option(
    state: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = objects(root)
    (root / "db.sqlite3").unlink() if state == "missing" else (root / "db.sqlite3").write_bytes(b"")
    assert main(["store", "check", str(root)]) == 1
    output = capsys.readouterr().err
    assert "store restore" in output
    assert "--adopt" in output
    status, found = check(root, capsys, "--adopt")
    assert (status, set(found)) == (1, {"ORPHAN"})
    assert objects(root) == before


@pytest.mark.parametrize("where", ["no store", "no directory"])
@pytest.mark.parametrize("command", ["check", "gc", "backup"])
def test_a_directory_without_a_store_is_refused(
    command: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path if where == "no store" else tmp_path / "nothing"
    more = [str(tmp_path / "target")] if command == "backup" else []
    assert main(["store", command, str(directory), *more]) == 1
    assert "is not a store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_backup_is_the_store_and_survives_its_damage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = root.parent / "backup"
    store = AdapterStore.open(root)  # in use
    assert main(["store", "backup", str(root), str(target)]) == 0
    assert "3 versions of 2 contents, no problems" in capsys.readouterr().out
    upload(store, "three")
    store.close()
    flip_program(root)
    (root / "db.sqlite3").unlink()
    assert main(["store", "restore", str(target), str(root)]) == 0
    output = capsys.readouterr().out
    aside = next(root.glob("replaced-*"))
    assert str(aside) in output
    assert len(objects(aside)) == 3
    with opened(root) as store:
        with store.lease(KEY) as held:
            assert held.program.read_text() == "compiled one"
        assert upload(store, "four").key.number == 3
    assert check(root, capsys) == (0, {})
    # The backup's database belongs to the backup: beside the objects of the restored store it is refused.
    shutil.copy(target / "db.sqlite3", root / "db.sqlite3")
    with pytest.raises(FailedPreconditionError, match="the objects are of store"):
        AdapterStore.open(root)


def test_a_backup_of_a_damaged_store_reports_the_damage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_program(root)
    assert main(["store", "backup", str(root), str(root.parent / "backup")]) == 1
    assert "PROGRAM_DAMAGED" in capsys.readouterr().out
    assert main(["store", "backup", str(root), str(root.parent / "backup")]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("moves", range(9))
def test_a_restore_that_is_broken_off_leaves_the_store_as_it_was_or_one_that_is_refused_and_can_be_done_again(
    moves: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["store", "backup", str(root), str(tmp_path / "backup")]) == 0
    rename, count = Path.rename, 0

    def broken_off(path: Path, target: Path) -> Path:
        nonlocal count
        if count == moves:
            raise KeyboardInterrupt
        count += path.is_relative_to(root)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken_off)
        with suppress(KeyboardInterrupt):
            main(["store", "restore", str(tmp_path / "backup"), str(root)])
    # It may be neither the former store nor the new one.
    with suppress(FailedPreconditionError), opened(root) as store:
        assert len(store.versions(KEY)) == 2
    assert main(["store", "restore", str(tmp_path / "backup"), str(root)]) == 0
    with opened(root) as store:
        assert len(store.versions(KEY)) == 2
    assert not list(root.glob(".restoring-*"))


def test_a_store_in_use_is_neither_restored_nor_cleaned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "backup", str(root), str(root.parent / "backup")]) == 0
    with opened(root):
        for command in (["restore", str(root.parent / "backup"), str(root)], ["gc", str(root), "--yes"]):
            assert main(["store", *command]) == 1
            assert "in use by another process" in capsys.readouterr().err


def test_backups_made_while_adapters_come_and_go_are_whole(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = AdapterStore.open(root)
    over = threading.Event()

    def change() -> None:
        number = 0
        while not over.is_set():
            key = AdapterKey("acme", f"a{number % 7}")
            upload(store, f"content {number}" * 100, key)
            store.delete_adapter(key)
            number += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for number in range(5):
            assert main(["store", "backup", str(root), str(root.parent / f"backup-{number}")]) == 0
    finally:
        over.set()
        thread.join()
        store.close()
    capsys.readouterr()
    for number in range(5):
        assert check(root.parent / f"backup-{number}", capsys) == (0, {})
        AdapterStore.open(root.parent / f"backup-{number}").close()
