"""Recompilation of stored uploads: for another base, or of damaged programs (``serve --recompile``)."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

from deltamux.deltas import BaseModel
from deltamux.errors import DeltamuxError, FailedPreconditionError, InvalidArgumentError, PluginError
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.compiling.job import Budgets, Job, encode_base
from deltamux.server.disk import DiskThreads
from deltamux.store import AdapterStore, VersionRecord
from deltamux.store.objects import IDENTITY_FILES

PLUGIN_SECONDS = 60.0

log = logging.getLogger("deltamux.server")


async def recompile_damaged(store: AdapterStore, model: str, budgets: Budgets) -> list[tuple[VersionRecord, str]]:
    """Recompiles every damaged program of a store for a base model, for the command line.

    Returns:
        a version of each damaged content, and why it is still damaged; "" if it is repaired.
    """
    base = await asyncio.to_thread(BaseModel.from_pretrained, model)
    store.programs.base_fingerprint = base.fingerprint
    with DiskThreads(1) as threads:
        async with Compiler(PLUGIN_SECONDS) as compiler:
            recompile = Recompiler(store, compiler, base, budgets, threads)
            damaged = await asyncio.to_thread(store.programs.damaged)
            return [(record, await _outcome(recompile, store, record)) for record in damaged]


async def _outcome(recompile: Recompiler, store: AdapterStore, record: VersionRecord) -> str:
    if store.programs.is_of_another_base(record):
        return f"it is for a base with fingerprint {record.compiled.base_fingerprint}, and this one has another"
    try:
        await recompile(record)
    except DeltamuxError as error:
        return error.message
    return ""


class Recompiler:
    """Replaces programs by new ones of the same uploads; one compilation per content, shared by its callers.

    Args:
        threads: for disk access.
    """

    def __init__(
        self, store: AdapterStore, compiler: Compiler, base: BaseModel, budgets: Budgets, threads: DiskThreads
    ) -> None:
        self._store = store
        self._compiler = compiler
        self._base = base
        self._encoded_base = encode_base(base)
        self._budgets = budgets
        self._threads = threads
        self._running: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, DeltamuxError] = {}

    async def __call__(self, record: VersionRecord) -> VersionRecord:
        """Compiles a version's stored upload for the present base; returns its record with the new program.

        A refusal is remembered and not tried again, as the files do not change.

        Raises:
            DataLossError: the stored upload is damaged too.
            FailedPreconditionError: the files cannot be compiled for the present base; the reason is that of an upload.
            DeltamuxError: they cannot be checked now, as for an upload.
        """
        digest = record.compiled.digest
        if (refusal := self._refused.get(digest)) is None:
            task = self._running.get(digest)
            if task is None:
                task = self._running[digest] = asyncio.create_task(self._compile(record))
                task.add_done_callback(lambda done: self._ended(digest, done))
            try:
                # Shielded: a cancelled caller must not cancel it for the others.
                await asyncio.shield(task)
            except PluginError:
                raise  # the cause may be the machine
            except (InvalidArgumentError, FailedPreconditionError) as error:
                refusal = self._refused[digest] = error
                log.warning("%s cannot be compiled for base %s: %s", record.key, self._base.fingerprint, error.message)
        if refusal is not None:
            raise _not_compiled(record, refusal)
        return await self._threads.run(self._store.version, record.key)

    async def _compile(self, record: VersionRecord) -> None:
        with self._store.staging() as staged:
            await self._threads.run(self._stage, record, staged)
            found = await self._compiler.compile(
                Job(staged, record.compiled.method, self._budgets, self._encoded_base), record.key.tenant
            )
            compiled = found.record(record.compiled.digest, self._base.fingerprint)
            await self._threads.run(self._store.programs.replace, staged, compiled)
        log.info("%s was recompiled for base %s", record.key, self._base.fingerprint)

    def _stage(self, record: VersionRecord, staged: Path) -> None:
        kept = self._store.programs.checked_upload(record)
        for name in IDENTITY_FILES:
            shutil.copy(kept / name, staged / name)

    def _ended(self, digest: str, task: asyncio.Task[None]) -> None:
        self._running.pop(digest, None)
        if not task.cancelled():
            task.exception()  # its callers have raised it, or were cancelled


def _not_compiled(record: VersionRecord, error: DeltamuxError) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{record.key} cannot be compiled for this server's base: {error.message}",
        reason=error.reason,
        metadata={"name": str(record.key), **error.metadata},
    )
