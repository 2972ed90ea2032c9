"""Which programs the workers keep in host memory: decided here, in the front end, where requests come and go.

A worker loads and drops exactly what it is told. A program that a request uses, or that is pinned, is never dropped; of
the others the one worth least goes first (see `residency`). So a scheduled step finds every program it needs in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from deltamux.engine.base import ProgramRef
from deltamux.engine.vllm.loader_link import LoaderLink
from deltamux.engine.vllm.residency import Residency
from deltamux.errors import DataLossError, DeltamuxError, FailedPreconditionError

LEAST_COST = 1e-6
"""Seconds that a reload is taken to cost at least."""


@dataclass(eq=False)
class Resident:
    """A program in the host tier, or on its way there.

    Attributes:
        ready: whether the workers have it, so that it may be in device slots too.
    """

    ref: ProgramRef
    program_id: int
    loaded: asyncio.Task[None] = field(init=False)
    ready: bool = False


class HostTier:
    """Residency of programs in the workers' host memory.

    Args:
        link: reaches the workers.
        capacity: programs to keep; it is exceeded only while more than that are in use or pinned at once.
    """

    def __init__(self, link: LoaderLink, capacity: int) -> None:
        self._link = link
        self._residents: dict[str, Resident] = {}
        self._residency: Residency[str] = Residency(capacity)
        self._condemned: set[str] = set()
        self._last_id = 0

    @asynccontextmanager
    async def lease(self, ref: ProgramRef) -> AsyncIterator[int]:
        """Makes a program ready, keeps it for the length of the block, and yields its id for the workers.

        Raises:
            FailedPreconditionError: the workers refuse the program; the message says why.
            DataLossError: its file is missing, or is not what was stored.
        """
        resident = self._admit(ref)
        self._residency.hold(ref.digest)
        try:
            await self._ready(resident)
            yield resident.program_id
        finally:
            self._residency.release(ref.digest)
            await self._shrink()

    def prefetch(self, ref: ProgramRef) -> None:
        """Begins to load a program that is about to be leased; returns at once."""
        if ref.digest not in self._residents:
            self._admit(ref)

    async def check(self, ref: ProgramRef) -> None:
        """Has the workers load a program, and drop it: it takes no other's place. Raises like `lease`."""
        self._last_id += 1
        program_id = self._last_id
        try:
            with _naming(ref.digest):
                await self._link.load(program_id, ref.path, ref.sha256)
        finally:
            await self._link.drop(program_id)

    async def pin(self, ref: ProgramRef) -> None:
        """Makes a program ready and keeps it, in host memory and in its device slot, until `unpin`."""
        async with self.lease(ref):
            await self._set_pin(ref.digest, True)

    async def unpin(self, digest: str) -> None:
        await self._set_pin(digest, False)
        await self._shrink()

    async def evict(self, digest: str) -> None:
        """Drops a program now, or as soon as its last request ends."""
        if digest in self._residents:
            self._condemned.add(digest)
            await self._shrink()

    def digests(self) -> list[str]:
        return list(self._residents)

    def digest_of(self, program_id: int) -> str | None:
        """Returns the digest of the program that the workers know by an id; None once it is no longer resident."""
        return next((digest for digest, r in self._residents.items() if r.program_id == program_id), None)

    async def _set_pin(self, digest: str, pinned: bool) -> None:
        if digest in self._residents:
            self._residency.pin(digest, pinned)
            await self._link.pin(self._residents[digest].program_id, pinned)

    def _admit(self, ref: ProgramRef) -> Resident:
        self._residency.use(ref.digest)
        resident = self._residents.get(ref.digest)
        if resident is None:
            # Never an id again: a worker may still be dropping the program under its former one.
            self._last_id += 1
            resident = self._residents[ref.digest] = Resident(ref, self._last_id)
            self._residency.hold(ref.digest)
            resident.loaded = asyncio.create_task(self._load(resident))
            # Whoever wanted it may be gone when it fails: then nobody else looks at the error.
            resident.loaded.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._condemned.discard(ref.digest)
        return resident

    async def _ready(self, resident: Resident) -> None:
        # Shielded: one impatient caller's cancellation must not cancel the load for the others.
        try:
            await asyncio.shield(resident.loaded)
        except DeltamuxError:
            self._condemned.add(resident.ref.digest)
            raise

    async def _load(self, resident: Resident) -> None:
        """Loads a program, which holds its place meanwhile; then what is too much goes, even if nobody waited."""
        digest = resident.ref.digest
        try:
            with _naming(digest):
                seconds = await self._link.load(resident.program_id, resident.ref.path, resident.ref.sha256)
            self._residency.charge(digest, max(seconds, LEAST_COST))
            resident.ready = True
        finally:
            if not resident.ready:
                self._condemned.add(digest)
            self._residency.release(digest)
            await self._shrink()

    async def _shrink(self) -> None:
        # Each victim leaves the table before the workers are told, and is looked up anew after: others run meanwhile.
        while (digest := self._victim()) is not None:
            resident = self._residents.pop(digest)
            self._residency.remove(digest)
            at_once = digest in self._condemned and resident.ready
            self._condemned.discard(digest)
            await self._link.drop(resident.program_id, at_once=at_once)

    def _victim(self) -> str | None:
        condemned = (digest for digest in self._condemned if self._residency.idle(digest))
        return next(condemned, None) or self._residency.surplus()


@contextmanager
def _naming(digest: str) -> Iterator[None]:
    """Names the program in what its load raises."""
    try:
        yield
    except FailedPreconditionError as error:
        problem = f"the engine cannot use program {digest[:12]}: {error.message}"
        raise FailedPreconditionError(problem, reason="PROGRAM_REFUSED", metadata={"digest": digest}) from error
    except DataLossError as error:
        problem = f"program {digest[:12]} cannot be loaded: {error.message}"
        raise DataLossError(problem, reason=error.reason, metadata={"digest": digest}) from error
