"""`LoaderClient`: the front end's end of the channels to all workers' loaders."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import NamedTuple

from deltamux.engine.vllm.loading.loader import DAMAGED, FAILED
from deltamux.errors import DataLossError, FailedPreconditionError, UnavailableError

WorkerCall = Callable[..., Awaitable[list[object]]]
"""Calls a method of every worker by name and returns their answers (vLLM's ``collective_rpc``)."""

FIRST_POLL = 0.001
LAST_POLL = 0.02
"""Seconds between polls of a load, where no socket leads to a worker: doubling from first to last."""

LINE_LIMIT = 1 << 20
FAILURE_SECONDS = 2.0
"""How long a worker's connection may stay open after the engine has died: its reason is read by then."""


class _Answer(NamedTuple):
    state: str
    seconds: float


class _Connection:
    """The front end's end of one worker's socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._pending: dict[int, asyncio.Future[_Answer]] = {}
        self.failure = ""
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def open(cls, path: str) -> _Connection:
        return cls(*await asyncio.open_unix_connection(path, limit=LINE_LIMIT))

    async def load(self, program_id: int, path: Path, sha256: str) -> _Answer:
        if self._reading.done():
            raise _gone()
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._pending[program_id] = answer
        self._send({"load": program_id, "path": str(path), "sha256": sha256})
        return await answer

    async def end_reason(self) -> str:
        """Waits a little for the worker's end; returns its reason, "" if it sent none."""
        await asyncio.wait([self._reading], timeout=FAILURE_SECONDS)
        return self.failure

    def drop(self, program_id: int) -> None:
        if not self._reading.done():
            self._send({"drop": program_id})

    async def close(self) -> None:
        self._writer.close()
        self._reading.cancel()
        await asyncio.wait([self._reading])

    def _send(self, message: dict[str, object]) -> None:
        # Not awaited until it is sent: a worker's thread reads at once, whatever its step loop does.
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if "failure" in message:
                    self.failure = message["failure"]
                    continue
                pending = self._pending.pop(message["program_id"], None)
                if pending is not None and not pending.done():
                    pending.set_result(_Answer(message["state"], message["seconds"]))
        except OSError:
            pass  # as good as an end of file: the worker has gone
        finally:
            for pending in self._pending.values():
                if not pending.done():
                    pending.set_exception(_gone())


class LoaderClient:
    """Loads and drops programs in all workers: by sockets, or ``collective_rpc`` where a worker is on another host."""

    def __init__(self, call_workers: WorkerCall, connections: list[_Connection]) -> None:
        self._call = call_workers
        self._connections = connections

    @classmethod
    async def open(cls, call_workers: WorkerCall, cores: Collection[int]) -> LoaderClient:
        """Makes the workers listen, and connects.

        Args:
            cores: where the loader threads may run: all that the machine lets this process use.
        """
        directory = Path(tempfile.mkdtemp(prefix="deltamux-"))
        try:
            paths = await call_workers("delta_listen", (str(directory), sorted(cores)))
            local = all(path is not None for path in paths)
            connections = [await _Connection.open(str(path)) for path in paths] if local else []
        finally:
            # A connected socket does not need its name.
            shutil.rmtree(directory, ignore_errors=True)
        return cls(call_workers, connections)

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()

    async def load(self, program_id: int, path: Path, sha256: str = "") -> float:
        """Loads a program in every worker; returns the seconds that the slowest took.

        Raises:
            FailedPreconditionError: a worker refuses the program; the message says why.
            DataLossError: the file is missing, or has not the given sha256.
            UnavailableError: a worker has gone.
        """
        if not self._connections:
            return await self._load_between_steps(program_id, path, sha256)
        answers = await asyncio.gather(*(c.load(program_id, path, sha256) for c in self._connections))
        _check([answer.state for answer in answers])
        return max(answer.seconds for answer in answers)

    async def drop(self, program_id: int, *, at_once: bool = False) -> None:
        """Drops a program from host memory; its device slot is free from the next step on, or `at_once`."""
        for connection in self._connections:
            connection.drop(program_id)
        if at_once or not self._connections:
            await self._call("delta_unload", (program_id,))

    async def end_reason(self) -> str:
        """Returns what a worker of an engine that has died raised in its last step; "" if none sent it."""
        reasons = [await connection.end_reason() for connection in self._connections]
        return next(filter(None, reasons), "")

    async def pin(self, program_id: int, pinned: bool) -> None:
        await self._call("delta_pin", (program_id, pinned))

    async def _load_between_steps(self, program_id: int, path: Path, sha256: str) -> float:
        loop = asyncio.get_running_loop()
        started, delay = loop.time(), FIRST_POLL
        await self._call("delta_load", (program_id, str(path), sha256))
        while True:
            states = [str(state) for state in await self._call("delta_status", (program_id,))]
            _check(states)
            if all(state == "ready" for state in states):
                return loop.time() - started
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_POLL)


def _check(states: list[str]) -> None:
    for state in states:
        if state.startswith(DAMAGED):
            raise DataLossError(state.removeprefix(DAMAGED), reason="PROGRAM_DAMAGED")
        if state.startswith(FAILED):
            raise FailedPreconditionError(state.removeprefix(FAILED), reason="PROGRAM_REFUSED")


def _gone() -> UnavailableError:
    return UnavailableError("a worker of the engine has gone; the request may be sent again once the engine is back")
