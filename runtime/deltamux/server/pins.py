"""Pinned adapters: their programs stay in the engine's memory, within a budget per tenant and a total."""

import logging
from collections.abc import Collection

from deltamux.engine.base import Engine
from deltamux.errors import DeltamuxError, NotFoundError, ResourceExhaustedError
from deltamux.server.disk import DiskThreads
from deltamux.server.programs import Programs
from deltamux.store import AdapterKey, AdapterRecord, AdapterStore, VersionKey, VersionRecord

log = logging.getLogger("deltamux.server")


class Pins:
    """The versions of pinned adapters in the engine's memory.

    Adapters of equal content share a program; it stays until the last of them is unpinned. All methods run on the event
    loop.

    Args:
        per_tenant: adapters that one tenant may pin.
        total: adapters that all tenants together may pin.
        threads: for disk access.

    Attributes:
        problems: by adapter, why it is pinned but not in the engine's memory.
    """

    def __init__(
        self, store: AdapterStore, engine: Engine, programs: Programs, per_tenant: int, total: int, threads: DiskThreads
    ) -> None:
        self.problems: dict[AdapterKey, str] = {}
        self._store = store
        self._engine = engine
        self._programs = programs
        self._per_tenant = per_tenant
        self._total = total
        self._threads = threads
        self._pinned: dict[AdapterKey, VersionRecord] = {}

    def holds(self, adapter: AdapterRecord) -> bool:
        """Whether the adapter's serving version is pinned in the engine's memory, or is being loaded."""
        held = self._pinned.get(adapter.key)
        return held is not None and held.key.number == adapter.serving

    async def add(self, adapter: AdapterRecord) -> None:
        """Pins an adapter's serving version, if the budgets allow for one more.

        Raises:
            ResourceExhaustedError: they do not.
            FailedPreconditionError, DataLossError: the version cannot be used.
        """
        pinned = {record.key for record in await self._threads.run(self._store.pinned)}
        await self._pin(adapter.key, await self._serving(adapter), pinned)

    async def follow(self, adapter: AdapterRecord) -> None:
        """Moves the pin of an adapter to its new serving version; an error is kept in `problems`, not raised."""
        try:
            await self._pin(adapter.key, await self._serving(adapter), ())
        except DeltamuxError as error:
            self._record_problem(adapter.key, error)

    async def retry(self, digest: str) -> None:
        """Pins adapters whose content was stored again: those with problems, and those of the replaced program."""
        held = [key for key, version in self._pinned.items() if version.compiled.digest == digest]
        for key in {*self.problems, *held}:
            try:
                adapter = await self._threads.run(self._store.adapter, key)
                serving = await self._serving(adapter)
            except NotFoundError:
                continue  # it was deleted meanwhile
            same = key in self._pinned and self._pinned[key].program_sha256 == serving.program_sha256
            if serving.compiled.digest == digest and not same:
                await self.follow(adapter)

    async def remove(self, key: AdapterKey) -> None:
        """Unpins the version of an adapter, if there is one."""
        self.problems.pop(key, None)
        version = self._pinned.pop(key, None)
        if version is not None:
            await self._unpin(version)

    async def forget(self, version: VersionRecord) -> None:
        """Unpins a version that was removed."""
        held = self._pinned.get(version.key.parent)
        if held is not None and held.key == version.key:
            await self.remove(version.key.parent)

    async def restore(self) -> None:
        """Pins the adapters that are marked in the store, one by one; an error of one does not affect others."""
        for adapter in await self._threads.run(self._store.pinned):
            try:
                await self._pin(adapter.key, await self._serving(adapter), self._pinned)
            except Exception as error:  # whatever is wrong with one tenant's files
                self._record_problem(adapter.key, error)
        if self.problems:
            log.error("%d pinned adapters are not in the engine's memory", len(self.problems))

    async def _serving(self, adapter: AdapterRecord) -> VersionRecord:
        return await self._threads.run(self._store.version, VersionKey(*adapter.key, adapter.serving))

    async def _pin(self, key: AdapterKey, version: VersionRecord, pinned: Collection[AdapterKey]) -> None:
        """Pins a version.

        Args:
            pinned: adapters that count against the budgets, besides those in memory.
        """
        self._check_budget(key, {*pinned, *self._pinned})
        before = self._pinned.get(key)
        self._pinned[key] = version
        try:
            await self._programs.pin(version)
        except BaseException:
            if self._pinned.get(key) is version:
                del self._pinned[key]
            raise
        finally:
            # Another version may serve by now, or the adapter may be deleted.
            for former in filter(None, (before, version)):
                await self._unpin(former)
        self.problems.pop(key, None)

    async def _unpin(self, version: VersionRecord) -> None:
        digest = version.compiled.digest
        if all(held.compiled.digest != digest for held in self._pinned.values()):
            await self._engine.unpin(digest)

    def _check_budget(self, key: AdapterKey, pinned: Collection[AdapterKey]) -> None:
        others = [other for other in pinned if other != key]
        if key in self._pinned:
            return
        own = sum(other.tenant == key.tenant for other in others)
        for count, limit, whose in (
            (own, self._per_tenant, f"tenants/{key.tenant} has"),
            (len(others), self._total, "all tenants together have"),
        ):
            if count >= limit:
                raise ResourceExhaustedError(
                    f"{whose} pinned {count} adapters, and at most {limit} may be pinned: unpin one first",
                    reason="PIN_BUDGET",
                    metadata={"limit": str(limit)},
                )

    def _record_problem(self, key: AdapterKey, error: Exception) -> None:
        reason = error.message if isinstance(error, DeltamuxError) else f"{type(error).__name__}: {error}"
        self.problems[key] = f"it is pinned, but not in the engine's memory: {reason}"
        log.error("%s is not pinned: %s", key, reason)
