"""The quarantine: the checks of an upload before it is a version.

The server process hashes the files and parses none of them. The compiler process reads them: the bytes of the
safetensors header first, then the config against the method, the tensors against the base, the values and the budgets.
The engine checks the compiled program, and the store commits it.
"""

from dataclasses import dataclass
from pathlib import Path

from deltamux.engine.base import Engine, ProgramRef
from deltamux.errors import InvalidAdapterError
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.compiling.job import Budgets, Job, encode_base
from deltamux.server.disk import DiskThreads
from deltamux.store import PROGRAM_FILE, AdapterKey, AdapterStore, CompiledAdapter, VersionRecord, content_digest


@dataclass(frozen=True)
class Upload:
    """The declarations of an upload.

    Attributes:
        method: the declared method; "" to recognise it by the files.
        expected_digest: the declared digest; "" for none.
        promote: see `AdapterStore.commit`.
    """

    key: AdapterKey
    method: str = ""
    expected_digest: str = ""
    promote: bool | None = None
    labels: dict[str, str] | None = None


class Quarantine:
    """The checks of uploads against the engine and its base model, and their commit.

    Args:
        threads: for disk access.
    """

    def __init__(
        self, store: AdapterStore, compiler: Compiler, engine: Engine, budgets: Budgets, threads: DiskThreads
    ) -> None:
        self._store = store
        self._compiler = compiler
        self._engine = engine
        self._base = engine.base
        self._encoded_base = encode_base(engine.base, engine.support)
        self._budgets = budgets
        self._threads = threads

    async def check(self, staged: Path, upload: Upload) -> CompiledAdapter:
        """Checks and compiles a staged upload; the store is not changed.

        Raises:
            InvalidAdapterError, InvalidConfigError, UnknownMethodError: the files are wrong, on any base.
            BaseMismatchError: they were made for another base.
            BudgetExceededError: they need more than the server allows for one adapter.
            PluginError: their method's plugin failed, hung or crashed.
            FailedPreconditionError: the engine cannot use them.
            UnavailableError: the engine is down, so they cannot be checked.
        """
        digest = await self._threads.run(_digest, staged, upload.expected_digest)
        job = Job(staged, upload.method, self._budgets, self._encoded_base)
        found = await self._compiler.compile(job, upload.key.tenant)
        await self._engine.check(ProgramRef(digest, staged / PROGRAM_FILE, found.num_virtual_tokens))
        return found.record(digest, self._base.fingerprint)

    async def commit(self, staged: Path, upload: Upload, compiled: CompiledAdapter) -> VersionRecord:
        """Commits a checked upload as a version; raises like `AdapterStore.commit`."""
        return await self._threads.run(
            self._store.commit, staged, upload.key, compiled, promote=upload.promote, labels=upload.labels
        )


def _digest(staged: Path, expected: str) -> str:
    digest = content_digest(staged)
    if expected and expected != digest:
        raise InvalidAdapterError(
            f"the files have digest {digest}, not {expected} as declared", reason="DIGEST_MISMATCH"
        )
    return digest
