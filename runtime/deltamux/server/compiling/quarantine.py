"""The quarantine: everything that could be wrong with an upload is found before a version of it can be routed.

The server's process hashes the files and parses none of them. The compiler's process reads them: the safetensors
header by its bytes first, then the config against the method, the tensors against the base, the values and budgets.
What it compiled is loaded by the engine, which may refuse it, and then committed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deltamux.engine.base import Engine, ProgramRef
from deltamux.errors import InvalidAdapterError
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.compiling.job import Budgets, Job, packed
from deltamux.store import PROGRAM_FILE, AdapterKey, AdapterStore, CompiledAdapter, VersionRecord, content_digest

T = TypeVar("T")


@dataclass(frozen=True)
class Upload:
    """What the uploader says of an upload.

    Attributes:
        method: the method it should be of; "" lets the files say.
        expected_digest: the digest it should have; "" for none.
        promote: see `AdapterStore.commit`.
    """

    key: AdapterKey
    method: str = ""
    expected_digest: str = ""
    promote: bool | None = None
    labels: dict[str, str] | None = None


class Quarantine:
    """Checks uploads against the engine and its base model, and commits what has passed.

    Args:
        threads: run what touches the disk.
    """

    def __init__(
        self,
        store: AdapterStore,
        compiler: Compiler,
        engine: Engine,
        budgets: Budgets,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._store = store
        self._compiler = compiler
        self._engine = engine
        self._base = engine.base
        self._packed = packed(engine.base)
        self._budgets = budgets
        self._threads = threads

    async def examine(self, staged: Path, upload: Upload) -> CompiledAdapter:
        """Checks and compiles a staged upload; nothing of the store has changed yet.

        Raises:
            InvalidAdapterError, InvalidConfigError, UnknownMethodError: the files are wrong, on any base.
            BaseMismatchError: they were made for another base.
            BudgetExceededError: they need more than the server gives one adapter.
            PluginError: their method's plugin failed, hung or crashed.
            FailedPreconditionError: the engine cannot use them.
            UnavailableError: the engine is down, so that nothing can be said of them.
        """
        digest = await self._run(lambda: _digest(staged, upload.expected_digest))
        job = Job(staged, upload.method, self._budgets, self._packed)
        found = await self._compiler.compile(job, upload.key.tenant)
        compiled = CompiledAdapter(
            digest, found.method, found.rank, found.num_virtual_tokens, found.num_bytes, self._base.fingerprint
        )
        await self._engine.check(ProgramRef(digest, staged / PROGRAM_FILE, found.num_virtual_tokens))
        return compiled

    async def commit(self, staged: Path, upload: Upload, compiled: CompiledAdapter) -> VersionRecord:
        """Makes an upload that was examined a version; raises like `AdapterStore.commit`."""
        return await self._run(
            lambda: self._store.commit(staged, upload.key, compiled, promote=upload.promote, labels=upload.labels)
        )

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _digest(staged: Path, expected: str) -> str:
    digest = content_digest(staged)
    if expected and expected != digest:
        raise InvalidAdapterError(
            f"the files have digest {digest}, not {expected} as announced", reason="DIGEST_MISMATCH"
        )
    return digest
