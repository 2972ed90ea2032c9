"""Pinned adapters: which programs the engine keeps in memory for them, within a budget per tenant and in all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from typing import TypeVar

from deltamux.engine.base import Engine
from deltamux.errors import DeltamuxError, NotFoundError, ResourceExhaustedError
from deltamux.server.programs import Programs
from deltamux.store import AdapterKey, AdapterRecord, AdapterStore, VersionKey, VersionRecord

T = TypeVar("T")
log = logging.getLogger("deltamux.server")


class Pins:
    """The versions that pinned adapters keep in the engine's memory.

    Adapters of equal content share a program; it stays until the last of them lets it go. All methods run on the event
    loop.

    Args:
        per_tenant: adapters that one tenant may pin.
        in_all: adapters that all tenants together may pin.
        threads: run what touches the disk.

    Attributes:
        problems: by adapter, why it is pinned and yet not in the engine's memory.
    """

    def __init__(
        self, store: AdapterStore, engine: Engine, programs: Programs, per_tenant: int, in_all: int, threads: Executor
    ) -> None:
        self.problems: dict[AdapterKey, str] = {}
        self._store = store
        self._engine = engine
        self._programs = programs
        self._per_tenant = per_tenant
        self._in_all = in_all
        self._threads = threads
        self._held: dict[AdapterKey, VersionRecord] = {}

    def holds(self, adapter: AdapterRecord) -> bool:
        """Whether the adapter's serving version is in the engine's memory for it, or on its way there."""
        held = self._held.get(adapter.key)
        return held is not None and held.key.number == adapter.serving

    async def add(self, adapter: AdapterRecord) -> None:
        """Pins an adapter's serving version, if the budgets allow for one more.

        Raises:
            ResourceExhaustedError: they do not.
            FailedPreconditionError, DataLossError: the version cannot be used.
        """
        pinned = {record.key for record in await self._run(self._store.pinned)}
        await self._hold(adapter.key, await self._serving(adapter), pinned)

    async def follow(self, adapter: AdapterRecord) -> None:
        """Moves the pin of an adapter whose serving version has changed; what hinders it is noted, not raised."""
        try:
            await self._hold(adapter.key, await self._serving(adapter), ())
        except DeltamuxError as error:
            self._note(adapter.key, error)

    async def retry(self, digest: str) -> None:
        """Pins adapters of a content that was stored anew: what could not be pinned, and what is of the old file."""
        held = [key for key, version in self._held.items() if version.compiled.digest == digest]
        for key in {*self.problems, *held}:
            try:
                adapter = await self._run(lambda: self._store.adapter(key))  # noqa: B023 - awaited here
                serving = await self._serving(adapter)
            except NotFoundError:
                continue  # it was deleted meanwhile
            same = key in self._held and self._held[key].program_sha256 == serving.program_sha256
            if serving.compiled.digest == digest and not same:
                await self.follow(adapter)

    async def remove(self, key: AdapterKey) -> None:
        """Lets go of what is held for an adapter, if anything is."""
        self.problems.pop(key, None)
        version = self._held.pop(key, None)
        if version is not None:
            await self._let_go(version)

    async def forget(self, version: VersionRecord) -> None:
        """Lets go of a version that is gone."""
        held = self._held.get(version.key.parent)
        if held is not None and held.key == version.key:
            await self.remove(version.key.parent)

    async def restore(self) -> None:
        """Pins what the store says is pinned, one after the other: what hinders one adapter hinders no other."""
        for adapter in await self._run(self._store.pinned):
            try:
                await self._hold(adapter.key, await self._serving(adapter), self._held)
            except Exception as error:  # one tenant's files, whatever is wrong with them, end nothing
                self._note(adapter.key, error)
        if self.problems:
            log.error("%d pinned adapters are not in the engine's memory", len(self.problems))

    async def _serving(self, adapter: AdapterRecord) -> VersionRecord:
        return await self._run(lambda: self._store.version(VersionKey(*adapter.key, adapter.serving)))

    async def _hold(self, key: AdapterKey, version: VersionRecord, pinned: Collection[AdapterKey]) -> None:
        """Pins a version.

        Args:
            pinned: adapters that count against the budgets, besides those that are held.
        """
        self._check_budget(key, {*pinned, *self._held})
        before = self._held.get(key)
        self._held[key] = version
        try:
            await self._programs.pin(version)
        except BaseException:
            if self._held.get(key) is version:
                del self._held[key]
            raise
        finally:
            # Another version may serve by now, or the adapter be gone.
            for former in filter(None, (before, version)):
                await self._let_go(former)
        self.problems.pop(key, None)

    async def _let_go(self, version: VersionRecord) -> None:
        digest = version.compiled.digest
        if all(held.compiled.digest != digest for held in self._held.values()):
            await self._engine.unpin(digest)

    def _check_budget(self, key: AdapterKey, pinned: Collection[AdapterKey]) -> None:
        others = [other for other in pinned if other != key]
        if key in self._held:
            return
        own = sum(other.tenant == key.tenant for other in others)
        for count, limit, whose in (
            (own, self._per_tenant, f"tenants/{key.tenant} has"),
            (len(others), self._in_all, "all tenants together have"),
        ):
            if count >= limit:
                raise ResourceExhaustedError(
                    f"{whose} pinned {count} adapters, and at most {limit} may be pinned: unpin one first",
                    reason="PIN_BUDGET",
                    metadata={"limit": str(limit)},
                )

    def _note(self, key: AdapterKey, error: Exception) -> None:
        reason = error.message if isinstance(error, DeltamuxError) else f"{type(error).__name__}: {error}"
        self.problems[key] = f"it is pinned, but not in the engine's memory: {reason}"
        log.error("%s is not pinned: %s", key, reason)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
