"""Which programs the workers keep in host memory: decided here, in the front end, where requests come and go.

A worker loads and drops exactly what it is told. A program that a request uses, or that is pinned, is never dropped; of
the others the least recently used goes first. So a scheduled step finds every program it needs ready in memory.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from deltamux.engine.base import ProgramRef
from deltamux.errors import FailedPreconditionError

WorkerCall = Callable[..., Awaitable[list[object]]]
"""Calls a method of every worker by name and returns their answers (vLLM's ``collective_rpc``)."""

FIRST_POLL = 0.001
LAST_POLL = 0.02
"""Seconds between looks at a program that loads: doubling from the first to the last."""


@dataclass(eq=False)
class Resident:
    """A program in the host tier, or on its way there."""

    ref: ProgramRef
    program_id: int
    loaded: asyncio.Task[None] = field(init=False)
    users: int = 0
    pinned: bool = False
    condemned: bool = False


class HostTier:
    """Residency of programs in the workers' host memory.

    Args:
        call_workers: reaches the workers.
        capacity: programs to keep; it is exceeded only while more than that are in use or pinned at once.
    """

    def __init__(self, call_workers: WorkerCall, capacity: int) -> None:
        self._call = call_workers
        self._capacity = capacity
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._last_id = 0

    @asynccontextmanager
    async def lease(self, ref: ProgramRef) -> AsyncIterator[int]:
        """Makes a program ready, keeps it for the length of the block, and yields its id for the workers.

        Raises:
            FailedPreconditionError: the workers refuse the program; the message says why.
        """
        resident = self._admit(ref)
        resident.users += 1
        try:
            await self._ready(resident)
            yield resident.program_id
        finally:
            resident.users -= 1
            await self._shrink()

    async def pin(self, digest: str) -> None:
        """Keeps a resident program, in host memory and in its device slot, until `unpin`."""
        if digest in self._residents:
            resident = self._residents[digest]
            resident.pinned = True
            await self._call("delta_pin", (resident.program_id, True))

    async def unpin(self, digest: str) -> None:
        if digest in self._residents:
            resident = self._residents[digest]
            resident.pinned = False
            await self._call("delta_pin", (resident.program_id, False))
            await self._shrink()

    async def evict(self, digest: str) -> None:
        """Drops a program now, or as soon as its last request ends."""
        if digest in self._residents:
            self._residents[digest].condemned = True
            await self._shrink()

    def digests(self) -> list[str]:
        return list(self._residents)

    def _admit(self, ref: ProgramRef) -> Resident:
        resident = self._residents.get(ref.digest)
        if resident is None:
            # Never an id again: a worker may still be dropping the program under its former one.
            self._last_id += 1
            resident = self._residents[ref.digest] = Resident(ref, self._last_id)
            resident.loaded = asyncio.create_task(self._load(resident))
        resident.condemned = False
        self._residents.move_to_end(ref.digest)
        return resident

    async def _ready(self, resident: Resident) -> None:
        # Shielded: one impatient caller's cancellation must not cancel the load for the others.
        try:
            await asyncio.shield(resident.loaded)
        except FailedPreconditionError:
            resident.condemned = True
            raise

    async def _load(self, resident: Resident) -> None:
        await self._call("delta_load", (resident.program_id, str(resident.ref.path)))
        delay = FIRST_POLL
        while True:
            states = await self._call("delta_status", (resident.program_id,))
            failed = [str(state) for state in states if str(state).startswith("failed")]
            if failed:
                raise FailedPreconditionError(
                    f"the engine cannot use program {resident.ref.digest[:12]}: {failed[0]}",
                    reason="PROGRAM_REFUSED",
                    metadata={"digest": resident.ref.digest},
                )
            if all(state == "ready" for state in states):
                return
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_POLL)

    async def _shrink(self) -> None:
        # Each victim leaves the table before the workers are told, and is looked up anew after: others run meanwhile.
        while (victim := self._victim()) is not None:
            del self._residents[victim.ref.digest]
            await self._call("delta_unload", (victim.program_id,))

    def _victim(self) -> Resident | None:
        surplus = len(self._residents) > self._capacity
        idle = (r for r in self._residents.values() if not r.users and not r.pinned and r.loaded.done())
        return next((r for r in idle if r.condemned or surplus), None)
