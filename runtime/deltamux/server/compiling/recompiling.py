"""Compiles stored uploads anew: for another base, or where a program is damaged (``serve --recompile``)."""

from __future__ import annotations

import asyncio
import logging
import shutil
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from deltamux.deltas import BaseModel
from deltamux.errors import DeltamuxError, FailedPreconditionError, InvalidArgumentError, PluginError
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.compiling.job import Budgets, Job, packed
from deltamux.store import AdapterStore, CompiledAdapter, VersionRecord
from deltamux.store.objects import IDENTITY_FILES

PLUGIN_SECONDS = 60.0

log = logging.getLogger("deltamux.server")


async def recompile_damaged(store: AdapterStore, model: str, budgets: Budgets) -> list[tuple[VersionRecord, str]]:
    """Compiles every damaged program of a store anew on a base model, for the command line.

    Returns:
        a version of each content that was damaged, and why it still is; "" where it is whole now.
    """
    base = await asyncio.to_thread(BaseModel.from_pretrained, model)
    store.programs.base_fingerprint = base.fingerprint
    with ThreadPoolExecutor(1) as threads:
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
    """Replaces programs by new ones of the same uploads; one compilation for each content, whoever wants it.

    Args:
        threads: run what touches the disk.
    """

    def __init__(
        self, store: AdapterStore, compiler: Compiler, base: BaseModel, budgets: Budgets, threads: Executor
    ) -> None:
        self._store = store
        self._compiler = compiler
        self._base = base
        self._packed = packed(base)
        self._budgets = budgets
        self._threads = threads
        self._running: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, DeltamuxError] = {}

    async def __call__(self, record: VersionRecord) -> VersionRecord:
        """Compiles a version's kept upload for the present base; returns its record with the new program.

        What an upload is refused for is not tried again: the files stay as they are.

        Raises:
            DataLossError: the kept upload is damaged too.
            FailedPreconditionError: the files cannot be compiled for the present base; the reason is that of an upload.
            DeltamuxError: nothing can be said of them now, as for an upload.
        """
        digest = record.compiled.digest
        if (refusal := self._refused.get(digest)) is None:
            task = self._running.get(digest)
            if task is None:
                task = self._running[digest] = asyncio.create_task(self._compile(record))
                task.add_done_callback(lambda done: self._ended(digest, done))
            try:
                # Shielded: a caller that goes away must not end it for the others.
                await asyncio.shield(task)
            except PluginError:
                raise  # it may have been the machine's doing
            except (InvalidArgumentError, FailedPreconditionError) as error:
                refusal = self._refused[digest] = error
                log.warning("%s cannot be compiled for base %s: %s", record.key, self._base.fingerprint, error.message)
        if refusal is not None:
            raise _not_compiled(record, refusal)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._store.version, record.key)

    async def _compile(self, record: VersionRecord) -> None:
        run, loop = self._threads, asyncio.get_running_loop()
        with self._store.staging() as staged:
            await loop.run_in_executor(run, self._stage, record, staged)
            found = await self._compiler.compile(
                Job(staged, record.compiled.method, self._budgets, self._packed), record.key.tenant
            )
            compiled = CompiledAdapter(
                record.compiled.digest,
                found.method,
                found.rank,
                found.num_virtual_tokens,
                found.num_bytes,
                self._base.fingerprint,
            )
            await loop.run_in_executor(run, self._store.programs.replace, staged, compiled)
        log.info("%s was compiled anew for base %s", record.key, self._base.fingerprint)

    def _stage(self, record: VersionRecord, staged: Path) -> None:
        kept = self._store.programs.kept_upload(record)
        for name in IDENTITY_FILES:
            shutil.copy(kept / name, staged / name)

    def _ended(self, digest: str, task: asyncio.Task[None]) -> None:
        self._running.pop(digest, None)
        if not task.cancelled():
            task.exception()  # whoever wanted it has heard of it, or has gone


def _not_compiled(record: VersionRecord, error: DeltamuxError) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{record.key} cannot be compiled for this server's base: {error.message}",
        reason=error.reason,
        metadata={"name": str(record.key), **error.metadata},
    )
