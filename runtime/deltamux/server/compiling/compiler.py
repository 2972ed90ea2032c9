"""`Compiler`: the server's interface to the process that runs plugins.

A plugin that hangs, leaks, exits or crashes ends that process and the current upload only: the error names the plugin,
and another process is started. This isolates faults, not malice: the process runs as the server's user.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Self
from weakref import WeakSet

from deltamux.errors import DeltamuxError, PluginCrashedError, PluginTimeoutError, UnavailableError
from deltamux.server.access.concurrency import ConcurrencyLimit
from deltamux.server.compiling.job import Compiled, Job, decode_error
from deltamux.server.compiling.process import CompilerProcess, CompilerProcessError

log = logging.getLogger("deltamux.server")

START_SECONDS = 300.0
"""For the process's own imports; the import of a plugin has the plugins' limit."""

ATTEMPTS = 2
"""Attempts of a job whose process ends without a plugin's fault."""

PAUSES = (0.0, 1.0, 5.0, 30.0, 60.0)
"""Seconds before an idle process is restarted, by the number of the last ones that ended within `SHORT_LIFE`."""

SHORT_LIFE = 60.0
RETRY_SECONDS = 10.0


class Compiler:
    """The compiler process and its queue: one job at a time, round robin over tenants. Entering it starts the process.

    A process that ends while idle is restarted. A job whose process ends without a plugin's fault is tried once more.

    Args:
        plugin_timeout: seconds for a plugin's import, and for a job.

    Attributes:
        methods: names of the installed methods; empty until the process has started.
        broken: skipped plugins, with the reason.
    """

    def __init__(self, plugin_timeout: float) -> None:
        self.methods: tuple[str, ...] = ()
        self.broken: dict[str, str] = {}
        self._timeout = plugin_timeout
        self._skipped: dict[str, str] = {}
        self._limit = ConcurrencyLimit(1, "compilations", queue_size=1 << 20)
        self._lock = asyncio.Lock()
        self._short_lives = 0
        self._process: CompilerProcess | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._abandoned: WeakSet[asyncio.Task[Any]] = WeakSet()

    async def __aenter__(self) -> Self:
        self._spawn(self._start_process())
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Ends the process and every job."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close_process()

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        return self._process.pid if self._process else None

    async def started(self) -> None:
        """Waits until a process is ready; raises UnavailableError if none can be started."""
        async with self._lock:
            await self._ensure_process()

    async def compile(self, job: Job, tenant: str = "") -> Compiled:
        """Compiles an adapter. After a cancellation the job still runs to its end, and its result is dropped.

        Args:
            tenant: the job's, for the round robin.

        Raises:
            DeltamuxError: the files, the base or the plugin's result are refused.
            PluginError: the plugin broke its contract.
            PluginTimeoutError, PluginCrashedError: the process was killed, or ended, during the job.
            UnavailableError: there is no process, and none can be started.
        """
        task = self._spawn(self._run(job, tenant))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._abandoned.add(task)
            raise

    async def refusal(self, method: str, base: str) -> str | None:
        """Returns why adapters of a method, with its default configuration, do not fit a base; "" where they do.

        None of a method that trains nothing. After a cancellation the process still finds it, and it is dropped.

        Args:
            base: as text of `encode_base`, with what an engine takes.
        Raises:
            UnavailableError: there is no process, none can be started, or what runs is ended from outside.
        """
        return await asyncio.shield(self._spawn(self._find_refusal(method, base)))

    async def _find_refusal(self, method: str, base: str) -> str | None:
        async with self._limit.acquire(""), self._lock:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    found = (await self._call({"fits": method, "base": base})).get("refusal")
                    return None if found is None else str(found)
                except CompilerProcessError as error:
                    await self._close_process()
                    if attempt < ATTEMPTS and error.external:
                        continue
                    self._spawn(self._start_process())
                    if error.phase is None and not error.timed_out:
                        raise _unavailable(f"the compiler process {error}; ask again") from None
                    return f"its plugin {error}"
            raise AssertionError("the last attempt returns or raises")

    async def _run(self, job: Job, tenant: str) -> Compiled:
        async with self._limit.acquire(tenant), self._lock:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    return await self._try(job)
                except (CompilerProcessError, ValueError) as error:
                    job_error = self._job_error(error, job)
                    log.error("%s: starting another compiler process", job_error.message)
                    await self._close_process()
                    if attempt < ATTEMPTS and isinstance(error, CompilerProcessError) and error.external:
                        continue
                    self._spawn(self._start_process())
                    raise job_error from None
            raise AssertionError("the last attempt returns or raises")

    async def _try(self, job: Job) -> Compiled:
        return _compiled(await self._call(job.message()))

    async def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the process's answer. No caller's cancellation may reach it: the next one would get this answer."""
        process = await self._ensure_process()
        answer = await process.call(message, self._timeout)
        if answer.get("leaks"):
            log.warning("a plugin leaks memory: starting another compiler process")
            await self._close_process()
            self._spawn(self._start_process())
        return answer

    async def _watch(self, process: CompilerProcess) -> None:
        """Starts another process when this one has ended while idle; a running job restarts it itself."""
        began = asyncio.get_running_loop().time()
        await process.ended()
        if self._process is not process or self._lock.locked():
            return
        lived = asyncio.get_running_loop().time() - began
        self._short_lives = self._short_lives + 1 if lived < SHORT_LIFE else 0
        pause = PAUSES[min(self._short_lives, len(PAUSES)) - 1] if self._short_lives else 0.0
        log.error("the compiler process has ended: starting another in %g s", pause)
        await asyncio.sleep(pause)
        await self._start_process()

    async def _start_process(self) -> None:
        with suppress(UnavailableError):  # it is logged, and the next job tries again
            await self.started()

    async def _ensure_process(self) -> CompilerProcess:
        if self._process is not None and self._process.alive:
            return self._process
        await self._close_process()
        while True:
            try:
                process = self._process = await CompilerProcess.open()
                answer = await process.call({"skip": self._skipped}, START_SECONDS, self._timeout)
                self._record_plugins(answer["methods"], answer["broken"])
                self._spawn(self._watch(process))
                return process
            except (CompilerProcessError, LookupError, OSError, TypeError, ValueError) as error:
                await self._close_process()
                self._skip_plugin(error)

    def _skip_plugin(self, error: Exception) -> None:
        """Records the plugin whose import ended the process; raises UnavailableError if it was not a plugin's."""
        phase = error.phase if isinstance(error, CompilerProcessError) else None
        if phase is None or phase.plugin in self._skipped:
            log.error("the compiler process does not start: it %s", error)
            raise _unavailable("the server cannot compile adapters now: its compiler process does not start")
        self._skipped[phase.plugin] = f"{phase.what} {error}"

    def _record_plugins(self, methods: list[str], broken: dict[str, str]) -> None:
        self.methods = tuple(map(str, methods))
        for plugin, problem in broken.items():
            if plugin not in self.broken:
                log.error("left out: plugin %r: %s", plugin, problem)
        self.broken = {str(plugin): str(problem) for plugin, problem in broken.items()}

    async def _close_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.close()

    def _job_error(self, error: Exception, job: Job) -> DeltamuxError:
        phase = error.phase if isinstance(error, CompilerProcessError) else None
        timed_out = isinstance(error, CompilerProcessError) and error.timed_out
        if isinstance(error, CompilerProcessError) and phase is None and not timed_out:
            return _unavailable(f"the compiler process {error}; send the upload again")
        what = (
            f"plugin {phase.plugin!r}: {phase.what}"
            if phase
            else f"compiling the adapter ({job.expected_method or 'unnamed'})"
        )
        metadata = {"plugin": phase.plugin, "hook": phase.what} if phase else {}
        kind = PluginTimeoutError if timed_out else PluginCrashedError
        return kind(
            f"{what} {error}", metadata=metadata | ({"method": job.expected_method} if job.expected_method else {})
        )

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None or isinstance(error, DeltamuxError):
            return
        # Its caller may have been cancelled.
        if task in self._abandoned:
            log.info("a job ended with its cancelled upload, whose files were removed: %s", type(error).__name__)
        else:
            log.error("compiling failed unexpectedly", exc_info=error)


def _unavailable(problem: str) -> UnavailableError:
    return UnavailableError(problem, reason="COMPILER_UNAVAILABLE", retry_after=RETRY_SECONDS)


def _compiled(answer: dict[str, Any]) -> Compiled:
    if "error" in answer:
        raise decode_error(answer["error"])
    if "unexpected" in answer:
        raise RuntimeError(f"the compiler process failed:\n{answer['unexpected']}")
    return Compiled.from_message(answer["compiled"] if isinstance(answer.get("compiled"), dict) else answer)
