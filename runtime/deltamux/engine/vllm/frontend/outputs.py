"""The outputs of one request, in chunks that come less often the more requests run.

A chunk costs far more on its way to a client (a message, a system call, two wake-ups) than its token did in the step's
batch. vLLM merges the outputs that its reader has not taken yet; so a reader that is woken less often gets fewer.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from vllm.outputs import RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.engine.output_processor import RequestOutputCollector

if TYPE_CHECKING:
    from vllm.outputs import PoolingRequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

CHUNKS_PER_SECOND_AND_CORE = 250
"""All requests together. A chunk over gRPC takes server and client 0.15 ms of a core: so 4 % of the machine."""
MOST_CHUNKS_PER_SECOND = 2000
"""However many cores there are: one event loop sends them all, and this is a sixth of its time."""
LONGEST_INTERVAL = 0.1
"""Seconds that a request's tokens gather at most while more of them come, and once more if none does."""


class Pace:
    """The time for which a request's tokens gather before its reader is woken; almost none while few requests run.

    Args:
        running: returns how many requests run.
        cores: CPUs that this process may use.
    """

    def __init__(self, running: Callable[[], int], cores: int) -> None:
        self._running = running
        self._chunks_per_second = min(CHUNKS_PER_SECOND_AND_CORE * cores, MOST_CHUNKS_PER_SECOND)

    @classmethod
    def of(cls, llm: AsyncLLM) -> Pace:
        running: Callable[[], int] = llm.output_processor.get_num_unfinished_requests
        return cls(running, len(os.sched_getaffinity(0)))

    def interval(self) -> float:
        """Returns the seconds from one chunk of a request to its next, at least."""
        return min(self._running() / self._chunks_per_second, LONGEST_INTERVAL)


class PacedCollector(RequestOutputCollector):
    """vLLM's output collector of one request, which wakes its reader at the pace.

    The first output, the last one and an error wake it at once; of the others the first that comes when the interval is
    over, or a timer if none does.
    """

    _pace: Pace
    _due: float
    _timer: asyncio.TimerHandle | None
    _loop: asyncio.AbstractEventLoop

    @classmethod
    def adopt(cls, collector: RequestOutputCollector, pace: Pace) -> PacedCollector:
        """Makes a collector of vLLM's, which may have an output already, one of this class."""
        collector.__class__ = cls
        assert isinstance(collector, cls)
        collector._pace, collector._due, collector._timer = pace, 0.0, None
        collector._loop = asyncio.get_running_loop()
        return collector

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        if self.output is None or isinstance(output, Exception):
            self.output = output
        else:
            super().put(output)  # merges, and wakes no reader
        if isinstance(output, Exception) or output.finished or self._loop.time() >= self._due:
            self._wake()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due + LONGEST_INTERVAL, self._wake)

    async def take(self) -> RequestOutput:
        """Waits for the next output and returns it.

        Raises:
            EngineDeadError, EngineGenerateError: the engine has died, or the request failed.
        """
        await self.ready.wait()
        try:
            output = self.get_nowait()
        except EngineDeadError:
            raise
        except Exception as error:
            raise EngineGenerateError from error
        assert isinstance(output, RequestOutput)
        self._due = self._loop.time() + self._pace.interval()
        return output

    def close(self) -> None:
        self._forget_timer()
        super().close()  # type: ignore[no-untyped-call]  # vLLM

    def _wake(self) -> None:
        self._forget_timer()
        if self.output is not None:  # the reader may have taken it since the timer was set
            self.ready.set()

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def outputs_of(llm: AsyncLLM, collector: PacedCollector) -> AsyncGenerator[RequestOutput]:
    """Yields a request's outputs to its end; closing the iterator before aborts the request in the engine."""
    state = llm.output_processor.request_states.get(collector.request_id)
    if state is not None and state.logprobs_processor is not None:
        # Alternatives are returned as ids. Their texts would be most of the event loop's work for such a request.
        state.logprobs_processor.tokenizer = None
    finished = False
    try:
        while not finished:
            output = await collector.take()
            finished = output.finished
            yield output
    finally:
        collector.close()
        if not finished and not llm.errored:
            with suppress(EngineDeadError):  # it died just now, and the request with it
                await llm.abort(collector.request_id, internal=True)
