"""`GrammarProcess`: the server's end of the process that tries grammars."""

import asyncio
import itertools
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from deltamux.child_process import HelperProcess, start_helper
from deltamux.errors import UnavailableError

CHILD_MODULE = "deltamux.engine.vllm.grammars.compiler"
START_SECONDS = 300.0
MAX_LINE = 1 << 20
MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """The settings of the process.

    Attributes:
        tokenizer: xgrammar's TokenizerInfo, serialised.
        any_whitespace, separators: as vLLM compiles JSON schemas.
        memory_bytes: that compiling a grammar may take.
        grammar_bytes: that a compiled grammar may keep; the engine holds it while it is used.
        step_seconds: CPU time that a token's mask may take; every request of the batch waits for it.
    """

    tokenizer: str
    any_whitespace: bool = True
    separators: tuple[str, str] | None = None
    memory_bytes: int = 512 * MIB
    grammar_bytes: int = 32 * MIB
    step_seconds: float = 0.005


class Answer(NamedTuple):
    """The result of a job.

    Attributes:
        problem: why the grammar is refused; None if it is not.
        ended: the job's process was ended by its limits, or by itself.
    """

    problem: str | None
    ended: bool


class GrammarProcess:
    """One process at a time, started with the first job and again after its end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._starting = asyncio.Lock()
        self._helper: HelperProcess | None = None
        self._reading: asyncio.Task[None] | None = None
        self._jobs: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = itertools.count()

    @property
    def pid(self) -> int | None:
        return self._helper.process.pid if self._helper else None

    async def start(self) -> None:
        """Returns once a process takes jobs; raises UnavailableError if none can be started."""
        async with self._starting:
            helper = self._helper
            if helper is None or helper.process.returncode is not None or helper.writer.is_closing():
                await self.close()
                try:
                    await self._open()
                except (OSError, ValueError, TimeoutError) as error:
                    await self.close()
                    raise UnavailableError(
                        "structured output is not available now: the process that tries grammars does not start",
                        reason="GRAMMARS_UNAVAILABLE",
                    ) from error

    async def run(self, kind: str, text: str, seconds: float) -> Answer:
        """Returns the answer of a grammar's job, which has so much CPU time. Cancelling ends the job."""
        await self.start()
        number = next(self._numbers)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._jobs[number] = answer
        limits = {name: getattr(self.settings, name) for name in ("memory_bytes", "grammar_bytes", "step_seconds")}
        self._send({"id": number, "kind": kind, "text": text, "seconds": seconds} | limits)
        try:
            return await answer
        except asyncio.CancelledError:
            self._send({"cancel": number})
            raise
        finally:
            self._jobs.pop(number, None)

    async def close(self) -> None:
        """Ends the process and every job, at once."""
        helper, self._helper = self._helper, None
        if helper is None:
            return
        helper.kill()
        helper.writer.close()
        await helper.process.wait()
        if self._reading is not None:
            await asyncio.wait([self._reading])

    async def _open(self) -> None:
        helper = self._helper = await start_helper(CHILD_MODULE, MAX_LINE, OMP_NUM_THREADS="1")
        helper.send(asdict(self.settings))
        async with asyncio.timeout(START_SECONDS):
            if not await helper.reader.readline():
                raise OSError("the process ended at its start")
        self._reading = asyncio.create_task(self._read(helper))

    async def _read(self, helper: HelperProcess) -> None:
        with suppress(OSError, ValueError):
            while line := await helper.reader.readline():
                message = json.loads(line)
                job = self._jobs.get(message["id"])
                if job is not None and not job.done():
                    job.set_result(Answer(message.get("problem"), "ended" in message))
        helper.writer.close()
        for job in self._jobs.values():
            if not job.done():
                job.set_exception(UnavailableError("the process that tries grammars has ended; send the request again"))

    def _send(self, message: dict[str, Any]) -> None:
        if self._helper is not None:
            self._helper.send(message)
