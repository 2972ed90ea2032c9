"""Compiles uploads in a process of its own, so that no plugin's code ever runs in the server.

A plugin may hang, leak, exit or crash: what it takes along is that process and the upload at hand. The server ends the
process, names the plugin, starts another, and serves on. This is a wall against faults, not against malice: the process
runs as the server's user.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Self
from weakref import WeakSet

from deltamux.errors import DeltamuxError, PluginCrashedError, PluginTimeoutError, UnavailableError
from deltamux.server.access.concurrency import ConcurrencyLimit
from deltamux.server.compiling.job import Compiled, Job, error_of
from deltamux.server.compiling.process import CompilerProcess, CompilerProcessError

log = logging.getLogger("deltamux.server")

START_SECONDS = 300.0
"""Until the process has imported what is ours; a plugin's import then has the plugins' own limit."""

ATTEMPTS = 2
"""How often a job is tried whose process ends by no plugin's doing."""

PAUSES = (0.0, 1.0, 5.0, 30.0, 60.0)
"""Seconds before an idle process is started again, by how often the last ones ended within `SHORT_LIFE` seconds."""

SHORT_LIFE = 60.0
RETRY_SECONDS = 10.0


class Compiler:
    """Owns the compiler process; jobs run one at a time, tenants by turns. Entering it begins to start the process.

    A process that ends while it has nothing to do is started again. A job whose process ends by no plugin's doing is
    tried once more.

    Args:
        plugin_timeout: seconds for a plugin's import, and for one job.

    Attributes:
        methods: names of the methods that the process offers; empty until it has started.
        broken: plugins that are left out, with the reason.
    """

    def __init__(self, plugin_timeout: float) -> None:
        self.methods: tuple[str, ...] = ()
        self.broken: dict[str, str] = {}
        self._timeout = plugin_timeout
        self._skipped: dict[str, str] = {}
        self._limit = ConcurrencyLimit(1, "compilations", max_waiting=1 << 20)
        self._one_at_a_time = asyncio.Lock()
        self._short_lives = 0
        self._process: CompilerProcess | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._abandoned: WeakSet[asyncio.Task[Any]] = WeakSet()

    async def __aenter__(self) -> Self:
        self._spawn(self._warm())
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Ends the process and every job."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._drop()

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        return self._process.pid if self._process else None

    async def started(self) -> None:
        """Waits until a process is ready; raises UnavailableError if none can be started."""
        async with self._one_at_a_time:
            await self._ready()

    async def compile(self, job: Job, tenant: str = "") -> Compiled:
        """Compiles an adapter. Cancelling it gives up the answer, not the job: the process goes on.

        Args:
            tenant: whose job it is; tenants whose jobs wait get their turns one after the other.

        Raises:
            DeltamuxError: as the files, the base or the plugin gave reason to.
            PluginError: the plugin broke its contract.
            PluginTimeoutError, PluginCrashedError: the process was ended, or ended itself, over the job.
            UnavailableError: there is no process, and none can be started.
        """
        task = self._spawn(self._run(job, tenant))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._abandoned.add(task)
            raise

    async def _run(self, job: Job, tenant: str) -> Compiled:
        async with self._limit.acquire(tenant), self._one_at_a_time:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    return await self._try(job)
                except (CompilerProcessError, ValueError) as error:
                    refused = self._refusal(error, job)
                    log.error("%s: starting another compiler process", refused.message)
                    await self._drop()
                    if attempt < ATTEMPTS and isinstance(error, CompilerProcessError) and error.from_outside:
                        continue
                    self._spawn(self._warm())
                    raise refused from None
            raise AssertionError("the last attempt returns or raises")

    async def _try(self, job: Job) -> Compiled:
        process = await self._ready()
        answer = await process.call(job.message(), self._timeout)
        if answer.get("leaks"):
            log.warning("some plugin keeps the memory of its jobs: starting another compiler process")
            await self._drop()
            self._spawn(self._warm())
        return _result(answer)

    async def _watch(self, process: CompilerProcess) -> None:
        """Starts another process once this one has ended while no job is at hand; one that is starts it itself."""
        began = asyncio.get_running_loop().time()
        await process.ended()
        if self._process is not process or self._one_at_a_time.locked():
            return
        lived = asyncio.get_running_loop().time() - began
        self._short_lives = self._short_lives + 1 if lived < SHORT_LIFE else 0
        pause = PAUSES[min(self._short_lives, len(PAUSES)) - 1] if self._short_lives else 0.0
        log.error("the compiler process has ended: starting another in %g s", pause)
        await asyncio.sleep(pause)
        await self._warm()

    async def _warm(self) -> None:
        with suppress(UnavailableError):  # it is in the log, and the next job tries again
            await self.started()

    async def _ready(self) -> CompilerProcess:
        if self._process is not None and self._process.alive:
            return self._process
        await self._drop()
        while True:
            try:
                process = self._process = await CompilerProcess.open()
                answer = await process.call({"skip": self._skipped}, START_SECONDS, self._timeout)
                self._note(answer["methods"], answer["broken"])
                self._spawn(self._watch(process))
                return process
            except (CompilerProcessError, LookupError, OSError, TypeError, ValueError) as error:
                await self._drop()
                self._leave_out(error)

    def _leave_out(self, error: Exception) -> None:
        """Notes the plugin over which the process did not start; raises UnavailableError if it was over none."""
        step = error.step if isinstance(error, CompilerProcessError) else None
        if step is None or step.plugin in self._skipped:
            log.error("the compiler process does not start: it %s", error)
            raise UnavailableError(
                "the server cannot compile adapters now: its compiler process does not start",
                reason="COMPILER_UNAVAILABLE",
                retry_after=RETRY_SECONDS,
            )
        self._skipped[step.plugin] = f"{step.what} {error}"

    def _note(self, methods: list[str], broken: dict[str, str]) -> None:
        self.methods = tuple(map(str, methods))
        for plugin, problem in broken.items():
            if plugin not in self.broken:
                log.error("left out: plugin %r: %s", plugin, problem)
        self.broken = {str(plugin): str(problem) for plugin, problem in broken.items()}

    async def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.close()

    def _refusal(self, error: Exception, job: Job) -> DeltamuxError:
        step = error.step if isinstance(error, CompilerProcessError) else None
        timed_out = isinstance(error, CompilerProcessError) and error.timed_out
        if isinstance(error, CompilerProcessError) and step is None and not timed_out:
            return UnavailableError(
                f"the compiler process {error}; send the upload again",
                reason="COMPILER_UNAVAILABLE",
                retry_after=RETRY_SECONDS,
            )
        who = (
            f"plugin {step.plugin!r}: {step.what}" if step else f"compiling the adapter ({job.announced or 'unnamed'})"
        )
        metadata = {"plugin": step.plugin, "hook": step.what} if step else {}
        kind = PluginTimeoutError if timed_out else PluginCrashedError
        return kind(f"{who} {error}", metadata=metadata | ({"method": job.announced} if job.announced else {}))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None or isinstance(error, DeltamuxError):
            return
        # Nobody may be left to hear of it.
        if task in self._abandoned:
            log.info("a job was given up with its upload, whose files went: %s", type(error).__name__)
        else:
            log.error("compiling failed unexpectedly", exc_info=error)


def _result(answer: dict[str, Any]) -> Compiled:
    if "error" in answer:
        raise error_of(answer["error"])
    if "unexpected" in answer:
        raise RuntimeError(f"the compiler process failed:\n{answer['unexpected']}")
    return Compiled.of(answer["compiled"] if isinstance(answer.get("compiled"), dict) else answer)
