"""The programs of versions on their way into the engine: damaged ones and those of another base are refused."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from deltamux.engine.base import Engine, ProgramRef
from deltamux.errors import DataLossError, FailedPreconditionError
from deltamux.server.disk import DiskThreads
from deltamux.store import AdapterStore, VersionRecord, VersionState

log = logging.getLogger("deltamux.server")

Recompile = Callable[[VersionRecord], Awaitable[VersionRecord]]
"""Compiles a version's stored upload for the present base, and returns its new record."""


class Programs:
    """Access to the programs of versions for the engine.

    Args:
        threads: for disk access.
        recompile: compiles a program that is damaged, or of another base; None refuses such versions.
    """

    def __init__(
        self, store: AdapterStore, engine: Engine, threads: DiskThreads, recompile: Recompile | None = None
    ) -> None:
        self._store = store
        self._engine = engine
        self._threads = threads
        self._recompile = recompile

    @asynccontextmanager
    async def using(self, record: VersionRecord) -> AsyncIterator[ProgramRef]:
        """Yields a version's program for use in the engine; marks the version if the engine finds the program damaged.

        Raises:
            DataLossError: the program is missing or damaged (PROGRAM_DAMAGED), or the version's row is (ROW_DAMAGED).
            FailedPreconditionError: it was compiled for another base (BASE_CHANGED).
        """
        record = await self._current(record)
        if not self._store.programs.row_is_checked(record):
            await self._threads.run(self._store.programs.check_row, record)
        try:
            yield program_ref(record)
        except DataLossError as error:
            problem = error.message
            log.error("%s is damaged: %s", record.key, problem)
            if record.damage != problem:
                await self._threads.run(self._store.programs.mark_damaged, record, problem)
            raise damaged_error(record, problem) from error
        if record.damage:
            await self._threads.run(self._store.programs.clear_damage, record)

    async def prepare(self, record: VersionRecord) -> None:
        """Loads a version's program into the engine's host memory; raises like `using`."""
        async with self.using(record) as program:
            await self._engine.prepare(program)

    async def pin(self, record: VersionRecord) -> None:
        """Keeps a version's program in the engine's memory until the engine unpins it; raises like `using`."""
        async with self.using(record) as program:
            await self._engine.pin(program)

    async def _current(self, record: VersionRecord) -> VersionRecord:
        changed = self._store.programs.is_of_another_base(record)
        if self._recompile is None:
            if changed:
                raise base_changed_error(record, self._store.programs.base_fingerprint)
            return record
        if not changed and not record.damage:
            try:
                await self._engine.prepare(program_ref(record))
                return record
            except DataLossError as error:
                log.warning("%s is damaged, and is compiled again: %s", record.key, error.message)
        return await self._recompile(record)


def program_ref(record: VersionRecord) -> ProgramRef:
    compiled = record.compiled
    return ProgramRef(compiled.digest, record.program, compiled.num_virtual_tokens, record.program_sha256)


def damaged_error(record: VersionRecord, problem: str) -> DataLossError:
    return DataLossError(
        f"{record.key} is damaged: {problem}. Upload the same files again, to any adapter, to repair it",
        reason="PROGRAM_DAMAGED",
        metadata={"name": str(record.key), "digest": record.compiled.digest, "state": VersionState.DAMAGED},
    )


def base_changed_error(record: VersionRecord, present: str) -> FailedPreconditionError:
    compiled_for = record.compiled.base_fingerprint
    return FailedPreconditionError(
        f"{record.key} was compiled for a base with fingerprint {compiled_for}, and this server's base has {present}: "
        "upload an adapter of this base, serve the former base, or start the server with `deltamux serve --recompile`, "
        "which compiles the stored files for this base",
        reason="BASE_CHANGED",
        metadata={"name": str(record.key), "compiled_for": compiled_for, "base": present},
    )
