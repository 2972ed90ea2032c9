"""Any order of uploads, changes, deletions, crashes and damage leaves the store as a few dictionaries would be.

What is referred to, or was not let go, is never deleted; what is whole is served; what is not is named.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltamux.errors import FailedPreconditionError
from deltamux.store import AdapterKey, AdapterStore, VersionKey, VersionState
from deltamux.store import objects as object_files
from deltamux.store.inspection import Kind, inspect
from deltamux.store.objects import file_sum
from deltamux_testing.uploads import digest_of, objects, upload

MEMORY = Path("/dev/shm")
KEYS = [AdapterKey("acme", "tickets"), AdapterKey("acme", "mails"), AdapterKey("globex", "tickets")]
CONTENTS = "abcdef"
MOMENTS = st.integers(0, 50)


class Adapter:
    """The expected state of an adapter: contents by number, and the numbers promoted, oldest first."""

    def __init__(self) -> None:
        self.versions: dict[int, str] = {}
        self.history: list[int] = []
        self.last = 0

    def upload(self, content: str, promote: bool | None) -> int:
        number = next((n for n, c in self.versions.items() if c == content), None)
        if number is None:
            self.last += 1
            number = self.last
            self.versions[number] = content
        if (promote or not self.history) and self.history[-1:] != [number]:
            self.history.append(number)
        return number

    def delete(self) -> None:
        self.versions, self.history = {}, []


class RandomWalk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.root = self.home / "0"
        self.store = AdapterStore.open(self.root)
        self.adapters = {key: Adapter() for key in KEYS}
        self.copies = 0
        self.orphans: set[str] = set()
        self.harmed: set[str] = set()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.home)

    def present(self) -> list[AdapterKey]:
        return [key for key in KEYS if self.adapters[key].versions]

    def stored(self) -> set[str]:
        return {content for adapter in self.adapters.values() for content in adapter.versions.values()}

    @rule(key=st.sampled_from(KEYS), content=st.sampled_from(CONTENTS), promote=st.sampled_from([None, True]))
    def upload(self, key: AdapterKey, content: str, promote: bool | None) -> None:
        record = upload(self.store, content, key, promote=promote)
        assert record.key.number == self.adapters[key].upload(content, promote)
        assert record.compiled.digest == digest_of(content)
        self.harmed.discard(content)

    @precondition(lambda self: self.present())
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.present()))
        adapter = self.adapters[key]
        number = data.draw(st.sampled_from(sorted(adapter.versions)))
        self.store.promote(key, number)
        if adapter.history[-1] != number:
            adapter.history.append(number)

    @precondition(lambda self: any(len(a.history) > 1 for a in self.adapters.values()))
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key in KEYS if len(self.adapters[key].history) > 1]))
        self.store.rollback(key)
        self.adapters[key].history.pop()

    @precondition(lambda self: any(len(a.versions) > 1 for a in self.adapters.values()))
    @rule(data=st.data())
    def delete_version(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key in KEYS if len(self.adapters[key].versions) > 1]))
        adapter = self.adapters[key]
        number = data.draw(st.sampled_from([n for n in sorted(adapter.versions) if n != adapter.history[-1]]))
        self.store.delete_version(VersionKey(*key, number))
        del adapter.versions[number]
        adapter.history = [n for n in adapter.history if n != number]
        self.forget_the_lost()

    @precondition(lambda self: self.present())
    @rule(data=st.data())
    def delete_adapter(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.present()))
        self.store.delete_adapter(key)
        self.adapters[key].delete()
        self.forget_the_lost()

    @precondition(lambda self: self.present())
    @rule(data=st.data())
    def delete_tenant(self, data: st.DataObject) -> None:
        tenant = data.draw(st.sampled_from(self.present())).tenant
        self.store.delete_tenant(tenant, force=True)
        for key in KEYS:
            if key.tenant == tenant:
                self.adapters[key].delete()
        self.forget_the_lost()

    def forget_the_lost(self) -> None:
        self.harmed &= self.stored()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = AdapterStore.open(self.root)

    @rule(
        key=st.sampled_from(KEYS), content=st.sampled_from(CONTENTS), deletes=st.booleans(), moment=st.integers(0, 11)
    )
    def crash(self, key: AdapterKey, content: str, deletes: bool, moment: int) -> None:
        """A kill -9 at one of the moments of an upload or a deletion: it has happened, or it has not."""
        deletes = deletes and bool(self.adapters[key].versions)
        self.copies += 1
        copy = self.home / str(self.copies)
        states = [self.state()]
        with pytest.MonkeyPatch.context() as patch:
            copy_at(moment, self.store, self.root, copy, patch)
            self.store.delete_adapter(key) if deletes else upload(self.store, content, key)
        states.append(self.state())
        acknowledged = not copy.exists()
        self.store.close()
        if not acknowledged:
            shutil.rmtree(self.root)
            self.root = copy
        self.store = AdapterStore.open(self.root)
        now = self.state()
        assert now in states[acknowledged:]
        if now == states[1] and states[0] != states[1]:
            self.adapters[key].delete() if deletes else self.adapters[key].upload(content, None)
        if not deletes and file_or_nothing(self.program(content)) == f"compiled {content}":
            self.harmed.discard(content)
        self.forget_the_lost()

    def program(self, content: str) -> Path:
        digest = digest_of(content)
        return self.root / "objects" / digest[:2] / digest / "program.safetensors"

    def state(self) -> dict[AdapterKey, tuple[int, list[tuple[int, str]]]]:
        return {
            a.key: (a.serving, [(v.key.number, v.compiled.digest) for v in self.store.versions(a.key)])
            for tenant in ("acme", "globex")
            for a in self.store.adapters(tenant)
        }

    @precondition(lambda self: self.stored() - self.harmed)
    @rule(data=st.data(), harm=st.sampled_from(["flip", "truncate", "remove", "remove all"]))
    def damage(self, data: st.DataObject, harm: str) -> None:
        content = data.draw(st.sampled_from(sorted(self.stored() - self.harmed)))
        path = self.program(content)
        if harm == "flip":
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        elif harm == "truncate":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.unlink() if harm == "remove" else shutil.rmtree(path.parent)
        self.harmed.add(content)

    @rule(number=st.integers(0, 99))
    def add_orphan(self, number: int) -> None:
        digest = f"{number:02}" * 32
        (self.root / "objects" / digest[:2] / digest).mkdir(parents=True, exist_ok=True)
        self.orphans.add(digest)

    @rule()
    def collect_orphans(self) -> None:
        assert set(self.store.collect_orphans()) == self.orphans
        self.orphans.clear()

    @rule(older=st.booleans())
    def lose_the_database(self, older: bool) -> None:
        """It is refused, whatever was lost, and nothing of the objects is; with the right one all goes on."""
        copy = self.home / "older.sqlite3"
        if older:
            self.store.close()
            shutil.copy(self.root / "db.sqlite3", copy)
            self.store = AdapterStore.open(self.root)
        self.store.close()
        before, path, right = objects(self.root), self.root / "db.sqlite3", self.home / "right.sqlite3"
        path.rename(right)
        if older:
            shutil.copy(copy, path)
        with pytest.raises(FailedPreconditionError) as refused:
            AdapterStore.open(self.root)
        assert refused.value.reason == ("STORE_OUTDATED" if older else "STORE_MISMATCH")
        assert objects(self.root) == before
        for name in ("db.sqlite3", "db.sqlite3-wal", "db.sqlite3-shm"):
            (self.root / name).unlink(missing_ok=True)
        right.rename(path)
        self.store = AdapterStore.open(self.root)

    @invariant()
    def agrees(self) -> None:
        for key, adapter in self.adapters.items():
            if not adapter.versions:
                continue
            records = self.store.versions(key)
            assert {r.key.number: r.compiled.digest for r in records} == {
                n: digest_of(c) for n, c in adapter.versions.items()
            }
            with self.store.lease(key) as held:
                assert held.key.number == adapter.history[-1]
            for record in records:
                content = adapter.versions[record.key.number]
                if content not in self.harmed:
                    assert record.program.read_text() == f"compiled {content}"
                    assert file_sum(record.program) == record.program_sha256
                    assert record.state is VersionState.READY
        assert len([a for t in ("acme", "globex") for a in self.store.adapters(t)]) == len(self.present())

    @invariant()
    def nothing_is_deleted_and_all_damage_is_named(self) -> None:
        stored = {digest_of(content) for content in self.stored()}
        harmed = {digest_of(content) for content in self.harmed}
        assert stored - harmed <= objects(self.root)
        assert objects(self.root) <= stored | self.orphans
        report = inspect(self.root)
        assert {f.digest for f in report.of_kind(Kind.ORPHAN)} == self.orphans
        assert {f.digest for f in report.of_kind(Kind.PROGRAM_DAMAGED, Kind.PROGRAM_MISSING)} == harmed


def file_or_nothing(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def copy_at(moment: int, store: AdapterStore, root: Path, copy: Path, patch: pytest.MonkeyPatch) -> None:
    """Copies the store's directory at its n-th wait for the disk, or n-th begin or end of a transaction."""
    passed = 0

    def look() -> None:
        nonlocal passed
        if passed == moment:
            shutil.copytree(root, copy)
        passed += 1

    def around(inner: Callable[..., object]) -> Callable[..., object]:
        def run(*given: object, **named: object) -> object:
            look()
            result = inner(*given, **named)
            look()
            return result

        return run

    database = store._database
    patch.setattr(object_files, "_sync", around(object_files._sync))
    patch.setattr(database, "execute", around(database.execute))
    patch.setattr(store._objects, "put", around(store._objects.put))
    patch.setattr(store._objects, "remove", around(store._objects.remove))


RandomWalk.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestRandomWalk = pytest.mark.slow(RandomWalk.TestCase)
