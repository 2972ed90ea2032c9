"""`CompilerProcess`: the server's end of one compiler process."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from deltamux.child_process import HelperProcess, start_helper

MAX_LINE = 1 << 24
CHILD_MODULE = "deltamux.server.compiling.child"

_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
"""SIGKILL is also how Linux ends a process when memory is short."""

MOST_WAITING = 10.0
"""Times its patience that a process may take where it waits for a core: the engine's threads go before it."""

LEAST_SECONDS, CHECK_SECONDS = 0.01, 0.5
"""Between two looks at the clock of a process."""


class Clock(NamedTuple):
    """A moment, and what a process has had of the cores until then.

    Attributes:
        ran: seconds on a core.
        waited: seconds for which it waited for one, without the wait that is not over.
        runnable: whether it runs or waits.
    """

    wall: float
    ran: float = 0.0
    waited: float = 0.0
    runnable: bool = False


class Step(NamedTuple):
    """What the process is running, as its last message said."""

    plugin: str
    what: str


class CompilerProcessError(Exception):
    """The process gave no answer: it is late (``timed_out``), has ended, or sent what is no answer.

    Attributes:
        step: what it ran last; None if it ran nothing of a plugin's.
        status: how the process ended, as in `subprocess` (minus the number of a signal); None if it has not.
    """

    def __init__(self, problem: str, step: Step | None, *, timed_out: bool = False, status: int | None = None) -> None:
        super().__init__(problem)
        self.step = step
        self.timed_out = timed_out
        self.status = status

    @property
    def from_outside(self) -> bool:
        """Whether no plugin caused the end, as far as can be known: none ran, or the process was ended by a signal."""
        return not self.timed_out and (self.step is None or self.status in _FROM_OUTSIDE)


class CompilerProcess:
    """One process, from its start to its end. After a `CompilerProcessError`, `close` it and open another."""

    def __init__(self, helper: HelperProcess) -> None:
        self._helper = helper
        self._process = helper.process
        self._step: Step | None = None
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def open(cls) -> CompilerProcess:
        """Starts a process; call it from the thread that lives as long as the server, with which the process ends."""
        return cls(await start_helper(CHILD_MODULE, MAX_LINE))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None and not self._helper.reader.at_eof()

    async def call(
        self, message: dict[str, Any], patience: float, step_patience: float | None = None
    ) -> dict[str, Any]:
        """Sends a message and returns the answer to it.

        Args:
            patience: seconds until the answer.
            step_patience: seconds per step instead, from the first that the process names on.
        Raises:
            CompilerProcessError: there is no answer.
        """
        self._step, allowed, since = None, patience, self._clock()
        try:
            async with asyncio.timeout(patience):
                self._helper.send(message)
                await self._helper.writer.drain()
            while True:
                answer = await self._receive_within(allowed, since)
                if "step" not in answer:
                    return answer
                self._step = Step(str(answer.get("plugin")), str(answer["step"]))
                if step_patience is not None:
                    allowed, since = step_patience, self._clock()
        except TimeoutError:
            raise CompilerProcessError(f"took more than {allowed:g} s", self._step, timed_out=True) from None
        except OSError:
            raise await self._ended() from None

    async def _receive_within(self, seconds: float, since: Clock) -> dict[str, Any]:
        """Returns the process's next message. Seconds in which it waits for a core do not count, up to a limit.

        Raises:
            TimeoutError: none comes in time.
        """
        pending, last = 0.0, since
        while True:
            now = self._clock()
            # A wait that is not over is in no statistic: the process is runnable, and has had no core since the last
            # look.
            pending = pending + now.wall - last.wall if now.runnable and now.ran == last.ran else 0.0
            last = now
            wall, waited = now.wall - since.wall, now.waited - since.waited + pending
            left = min(seconds - (wall - waited), seconds * MOST_WAITING - wall)
            if left <= 0:
                raise TimeoutError
            with suppress(TimeoutError):
                async with asyncio.timeout(min(max(left, LEAST_SECONDS), CHECK_SECONDS)):
                    return await self._receive()

    def _clock(self) -> Clock:
        wall, folder = time.monotonic(), Path(f"/proc/{self.pid}")
        try:
            ran, waited, *_ = map(int, (folder / "schedstat").read_text().split())
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError, ValueError):  # outside Linux, or it has ended
            return Clock(wall)
        return Clock(wall, ran / 1e9, waited / 1e9, state == "R")

    async def ended(self) -> None:
        """Waits until the process has ended, by any cause."""
        await asyncio.wait([self._watching])

    async def close(self) -> None:
        """Ends the process and what it started, at once."""
        self._end()
        self._helper.writer.close()
        await asyncio.wait([self._watching])
        with suppress(OSError):
            await self._helper.writer.wait_closed()

    async def _receive(self) -> dict[str, Any]:
        try:
            line = await self._helper.reader.readline()
            if not line.endswith(b"\n"):
                raise await self._ended()
            answer = json.loads(line)
        except ValueError as error:
            raise CompilerProcessError(f"broke its connection to the server ({error})", self._step) from error
        if not isinstance(answer, dict):
            raise CompilerProcessError("broke its connection to the server", self._step)
        return answer

    async def _ended(self) -> CompilerProcessError:
        self._end()  # its end of the socket may be closed while it lives on
        status = await self._process.wait()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        return CompilerProcessError(f"ended its process {how}", self._step, status=status)

    async def _watch(self) -> None:
        """Once the process has ended ends what it started, which may hold the socket open."""
        await self._process.wait()
        self._helper.kill()

    def _end(self) -> None:
        if self._process.returncode is None:
            self._helper.kill()
