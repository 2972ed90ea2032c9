"""Versions as the engine gets them: programs of its base, whole, or refused by name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Any

from deltamux.engine.base import Engine, ProgramRef
from deltamux.errors import DataLossError, FailedPreconditionError
from deltamux.store import AdapterStore, VersionRecord, VersionState

log = logging.getLogger("deltamux.server")

Recompile = Callable[[VersionRecord], Awaitable[VersionRecord]]
"""Compiles a version's kept upload for the present base, and returns its record afterwards."""


class Programs:
    """Looks after the programs of versions while the engine uses them.

    Args:
        threads: run what touches the disk.
        recompile: makes a program anew that is damaged, or of another base; None leaves such versions refused.
    """

    def __init__(
        self, store: AdapterStore, engine: Engine, threads: Executor, recompile: Recompile | None = None
    ) -> None:
        self._store = store
        self._engine = engine
        self._threads = threads
        self._recompile = recompile

    @asynccontextmanager
    async def using(self, record: VersionRecord) -> AsyncIterator[ProgramRef]:
        """Yields a version's program for use in the engine; a version that turns out to be damaged is marked so.

        Raises:
            DataLossError: the program is missing or damaged (PROGRAM_DAMAGED), or the version's row is (ROW_DAMAGED).
            FailedPreconditionError: it was compiled for another base (BASE_CHANGED).
        """
        record = await self._usable(record)
        if not self._store.programs.agrees(record):
            await self._run(lambda: self._store.programs.check_row(record))
        try:
            yield program_of(record)
        except DataLossError as error:
            problem = error.message
            log.error("%s is damaged: %s", record.key, problem)
            if record.damage != problem:
                await self._run(lambda: self._store.programs.mark_damaged(record, problem))
            raise damaged(record, problem) from error
        if record.damage:
            await self._run(lambda: self._store.programs.mark_whole(record))

    async def prepare(self, record: VersionRecord) -> None:
        """Brings a version's program into the engine's host memory; raises like `using`."""
        async with self.using(record) as program:
            await self._engine.prepare(program)

    async def pin(self, record: VersionRecord) -> None:
        """Keeps a version's program in the engine's memory until the engine unpins it; raises like `using`."""
        async with self.using(record) as program:
            await self._engine.pin(program)

    async def _usable(self, record: VersionRecord) -> VersionRecord:
        changed = self._store.programs.is_of_another_base(record)
        if self._recompile is None:
            if changed:
                raise base_changed(record, self._store.programs.base_fingerprint)
            return record
        if not changed and not record.damage:
            try:
                await self._engine.prepare(program_of(record))
                return record
            except DataLossError as error:
                log.warning("%s is damaged, and compiled anew: %s", record.key, error.message)
        return await self._recompile(record)

    async def _run(self, work: Callable[[], Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, work)


def program_of(record: VersionRecord) -> ProgramRef:
    compiled = record.compiled
    return ProgramRef(compiled.digest, record.program, compiled.num_virtual_tokens, record.program_sha256)


def damaged(record: VersionRecord, problem: str) -> DataLossError:
    return DataLossError(
        f"{record.key} is damaged: {problem}. Upload the same files again, to any adapter, and it is repaired",
        reason="PROGRAM_DAMAGED",
        metadata={"name": str(record.key), "digest": record.compiled.digest, "state": VersionState.DAMAGED},
    )


def base_changed(record: VersionRecord, present: str) -> FailedPreconditionError:
    compiled_for = record.compiled.base_fingerprint
    return FailedPreconditionError(
        f"{record.key} was compiled for a base with fingerprint {compiled_for}, and this server's base has {present}: "
        "upload an adapter of this base, serve the former base, or start the server with `deltamux serve --recompile`, "
        "which compiles the stored files for this base",
        reason="BASE_CHANGED",
        metadata={"name": str(record.key), "compiled_for": compiled_for, "base": present},
    )
