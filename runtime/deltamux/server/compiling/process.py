"""`CompilerProcess`: one compiler process, as the server calls it."""

import asyncio
import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from deltamux.child_process import HelperProcess, start_helper

MAX_LINE = 1 << 24
CHILD_MODULE = "deltamux.server.compiling.child"

_EXTERNAL_STATUSES = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
"""SIGKILL is also how Linux ends a process when memory is short."""

MAX_STRETCH = 10.0
"""Wall time limit, in multiples of the timeout, of a process that waits for a core."""

MIN_CHECK_SECONDS, MAX_CHECK_SECONDS = 0.01, 0.5
"""Interval between two reads of a process's times."""


class ProcessTimes(NamedTuple):
    """The CPU times of a process at one moment.

    Attributes:
        wall: the moment.
        ran: seconds on a core.
        waited: seconds of finished waits for a core.
        runnable: whether it runs or waits for a core.
    """

    wall: float
    ran: float = 0.0
    waited: float = 0.0
    runnable: bool = False


class Phase(NamedTuple):
    """A plugin's import, check or hook, which the process runs by its last message."""

    plugin: str
    what: str


class CompilerProcessError(Exception):
    """The process did not answer: it timed out, ended, or sent an invalid message.

    Attributes:
        phase: its last phase; None if it ran no plugin.
        status: exit status as in `subprocess` (minus a signal's number); None if it has not ended.
    """

    def __init__(
        self, problem: str, phase: Phase | None, *, timed_out: bool = False, status: int | None = None
    ) -> None:
        super().__init__(problem)
        self.phase = phase
        self.timed_out = timed_out
        self.status = status

    @property
    def external(self) -> bool:
        """Whether the end was probably not a plugin's fault: none ran, or the process was ended by a signal."""
        return not self.timed_out and (self.phase is None or self.status in _EXTERNAL_STATUSES)


class CompilerProcess:
    """One process, from its start to its end. After a `CompilerProcessError`, `close` it and open another."""

    def __init__(self, helper: HelperProcess) -> None:
        self._helper = helper
        self._process = helper.process
        self._phase: Phase | None = None
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def open(cls) -> Self:
        """Starts a process; it ends with the calling thread."""
        return cls(await start_helper(CHILD_MODULE, MAX_LINE))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None and not self._helper.reader.at_eof()

    async def call(self, message: dict[str, Any], timeout: float, phase_timeout: float | None = None) -> dict[str, Any]:
        """Sends a message and returns the answer to it.

        Args:
            timeout: seconds until the answer.
            phase_timeout: seconds per phase instead, from the first announced phase on.
        Raises:
            CompilerProcessError: the process did not answer.
        """
        self._phase, allowed, since = None, timeout, self._times()
        try:
            async with asyncio.timeout(timeout):
                self._helper.send(message)
                await self._helper.writer.drain()
            while True:
                answer = await self._receive_within(allowed, since)
                if "phase" not in answer:
                    return answer
                self._phase = Phase(str(answer.get("plugin")), str(answer["phase"]))
                if phase_timeout is not None:
                    allowed, since = phase_timeout, self._times()
        except TimeoutError:
            raise CompilerProcessError(f"took more than {allowed:g} s", self._phase, timed_out=True) from None
        except OSError:
            raise await self._exit_error() from None

    async def _receive_within(self, seconds: float, since: ProcessTimes) -> dict[str, Any]:
        """Returns the process's next message. Seconds in which it waits for a core do not count, up to `MAX_STRETCH`.

        Raises:
            TimeoutError: there is none in time.
        """
        pending, last = 0.0, since
        while True:
            now = self._times()
            # The present wait is in no statistic: the process is runnable, and was not run since the last check.
            pending = pending + now.wall - last.wall if now.runnable and now.ran == last.ran else 0.0
            last = now
            wall, waited = now.wall - since.wall, now.waited - since.waited + pending
            left = min(seconds - (wall - waited), seconds * MAX_STRETCH - wall)
            if left <= 0:
                raise TimeoutError
            with suppress(TimeoutError):
                async with asyncio.timeout(min(max(left, MIN_CHECK_SECONDS), MAX_CHECK_SECONDS)):
                    return await self._receive()

    def _times(self) -> ProcessTimes:
        wall, folder = time.monotonic(), Path(f"/proc/{self.pid}")
        try:
            ran, waited, *_ = map(int, (folder / "schedstat").read_text().split())
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError, ValueError):  # not Linux, or it has ended
            return ProcessTimes(wall)
        return ProcessTimes(wall, ran / 1e9, waited / 1e9, state == "R")

    async def ended(self) -> None:
        """Waits until the process has ended, by any cause."""
        await asyncio.wait([self._watching])

    async def close(self) -> None:
        """Kills the process and its children."""
        self._kill()
        self._helper.writer.close()
        await asyncio.wait([self._watching])
        with suppress(OSError):
            await self._helper.writer.wait_closed()

    async def _receive(self) -> dict[str, Any]:
        try:
            line = await self._helper.reader.readline()
            if not line.endswith(b"\n"):
                raise await self._exit_error()
            answer = json.loads(line)
        except ValueError as error:
            raise CompilerProcessError(f"broke its connection to the server ({error})", self._phase) from error
        if not isinstance(answer, dict):
            raise CompilerProcessError("broke its connection to the server", self._phase)
        return answer

    async def _exit_error(self) -> CompilerProcessError:
        self._kill()  # its socket may be closed while it still runs
        status = await self._process.wait()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        return CompilerProcessError(f"ended its process {how}", self._phase, status=status)

    async def _watch(self) -> None:
        """Kills the children of the process once it has ended: they may hold the socket open."""
        await self._process.wait()
        self._helper.kill()

    def _kill(self) -> None:
        if self._process.returncode is None:
            self._helper.kill()
