"""`HostCache`: which programs the workers keep in host memory.

A worker loads and drops exactly the programs that it is sent. A program that a request uses, or that is pinned, is
never dropped; of the others the one worth least goes first (see `eviction`). So a scheduled step finds every program it
needs in memory.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from deltamux.engine.base import ProgramRef
from deltamux.engine.vllm.eviction import EvictionPolicy
from deltamux.engine.vllm.loading.client import LoaderClient
from deltamux.errors import DataLossError, DeltamuxError, FailedPreconditionError

LEAST_COST = 1e-6
"""Seconds that a reload is taken to cost at least."""


@dataclass(eq=False)
class CachedProgram:
    """A program in the cache, or on its way there.

    Attributes:
        ready: whether the workers have it, so that it may be in device slots too.
    """

    ref: ProgramRef
    program_id: int
    loaded: asyncio.Task[None] = field(init=False)
    ready: bool = False


class HostCache:
    """The programs in the workers' host memory.

    Args:
        loaders: those of the workers.
        capacity: programs to keep; it is exceeded only while more than that are in use or pinned at once.
    """

    def __init__(self, loaders: LoaderClient, capacity: int) -> None:
        self._loaders = loaders
        self._programs: dict[str, CachedProgram] = {}
        self._policy: EvictionPolicy[str] = EvictionPolicy(capacity)
        self._to_evict: set[str] = set()
        self._last_id = 0

    @asynccontextmanager
    async def lease(self, ref: ProgramRef) -> AsyncIterator[int]:
        """Makes a program ready, keeps it for the length of the block, and yields its id for the workers.

        Raises:
            FailedPreconditionError: the workers refuse the program; the message says why.
            DataLossError: its file is missing, or is not what was stored.
        """
        program = self._admit(ref)
        self._policy.hold(ref.digest)
        try:
            await self._ready(program)
            yield program.program_id
        finally:
            self._policy.release(ref.digest)
            await self._shrink()

    def prefetch(self, ref: ProgramRef) -> None:
        """Begins to load a program that is about to be leased; returns at once."""
        if ref.digest not in self._programs:
            self._admit(ref)

    async def check(self, ref: ProgramRef) -> None:
        """Loads a program in the workers, and drops it; no other is evicted for it. Raises like `lease`."""
        self._last_id += 1
        program_id = self._last_id
        try:
            with _naming(ref.digest):
                await self._loaders.load(program_id, ref.path, ref.sha256)
        finally:
            await self._loaders.drop(program_id)

    async def pin(self, ref: ProgramRef) -> None:
        """Makes a program ready and keeps it, in host memory and in its device slot, until `unpin`."""
        async with self.lease(ref):
            await self._set_pin(ref.digest, True)

    async def unpin(self, digest: str) -> None:
        await self._set_pin(digest, False)
        await self._shrink()

    async def evict(self, digest: str) -> None:
        """Drops a program now, or as soon as its last request ends."""
        if digest in self._programs:
            self._to_evict.add(digest)
            await self._shrink()

    def digests(self) -> list[str]:
        return list(self._programs)

    def digest_of(self, program_id: int) -> str | None:
        """Returns the digest of the program with an id; None once it is not cached."""
        return next((digest for digest, r in self._programs.items() if r.program_id == program_id), None)

    async def _set_pin(self, digest: str, pinned: bool) -> None:
        if digest in self._programs:
            self._policy.pin(digest, pinned)
            await self._loaders.pin(self._programs[digest].program_id, pinned)

    def _admit(self, ref: ProgramRef) -> CachedProgram:
        self._policy.use(ref.digest)
        program = self._programs.get(ref.digest)
        if program is None:
            # Never an id again: a worker may still be dropping the program under its former one.
            self._last_id += 1
            program = self._programs[ref.digest] = CachedProgram(ref, self._last_id)
            self._policy.hold(ref.digest)
            program.loaded = asyncio.create_task(self._load(program))
            # Its caller may be gone when it fails: then nothing else reads the error.
            program.loaded.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._to_evict.discard(ref.digest)
        return program

    async def _ready(self, program: CachedProgram) -> None:
        # Shielded: one caller's cancellation must not cancel the load for the others.
        try:
            await asyncio.shield(program.loaded)
        except DeltamuxError:
            self._to_evict.add(program.ref.digest)
            raise

    async def _load(self, program: CachedProgram) -> None:
        """Loads a program, which is held meanwhile; then the cache shrinks, even if no request waited."""
        digest = program.ref.digest
        try:
            with _naming(digest):
                seconds = await self._loaders.load(program.program_id, program.ref.path, program.ref.sha256)
            self._policy.set_cost(digest, max(seconds, LEAST_COST))
            program.ready = True
        finally:
            if not program.ready:
                self._to_evict.add(digest)
            self._policy.release(digest)
            await self._shrink()

    async def _shrink(self) -> None:
        # Each victim leaves the cache before the workers drop it, and the next is chosen after that: others run
        # meanwhile.
        while (digest := self._victim()) is not None:
            program = self._programs.pop(digest)
            self._policy.remove(digest)
            at_once = digest in self._to_evict and program.ready
            self._to_evict.discard(digest)
            await self._loaders.drop(program.program_id, at_once=at_once)

    def _victim(self) -> str | None:
        to_evict = (digest for digest in self._to_evict if self._policy.idle(digest))
        return next(to_evict, None) or self._policy.next_eviction()


@contextmanager
def _naming(digest: str) -> Iterator[None]:
    """A block that loads a program: errors of the block name it."""
    try:
        yield
    except FailedPreconditionError as error:
        problem = f"the engine cannot use program {digest[:12]}: {error.message}"
        raise FailedPreconditionError(problem, reason="PROGRAM_REFUSED", metadata={"digest": digest}) from error
    except DataLossError as error:
        problem = f"program {digest[:12]} cannot be loaded: {error.message}"
        raise DataLossError(problem, reason=error.reason, metadata={"digest": digest}) from error
