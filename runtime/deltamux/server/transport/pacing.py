"""What keeps a flood of calls from the streams that run and from health: calls are let in a few at a time, and the
refusals of one tenant are answered at a bounded pace.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any

import grpc

from deltamux.errors import DeltamuxError
from deltamux.server.access.caller import CURRENT

OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""Load balancers look at the health without a key, and are answered before others."""

TICK_SECONDS = 0.001
"""Between two moments at which calls are let in."""

PER_TICK = 2
"""Calls that are let in per tick where several wait."""

FLOOD = 3
"""Calls that come within a tick, from which on those that come are looked at before those that wait are let in."""

MAX_SKIPPED = 8
"""Ticks in a row in which none is let in."""

REFUSALS_PER_SECOND = 50.0
BURST = 50
"""Refusals of one tenant that are answered at once, after a second without any."""

BYTES_PER_REFUSAL = 1 << 16
"""A refused request of so many bytes counts as one more refusal."""

MAX_DELAY = 1.0
"""Seconds by which a refusal is late at most: less than the deadlines that callers set."""

request_bytes: ContextVar[int] = ContextVar("deltamux_request_bytes", default=0)
"""Of the messages that this task's RPC has received."""


class PacedCalls(grpc.aio.ServerInterceptor):
    """Lets calls in a few at a time, in their order; the outermost interceptor, and health passes it.

    A call costs about a millisecond of the loop until it runs or is refused. A thousand that come at once would all run
    together, and everything else of the loop after them. As gRPC hands over one call per turn of the loop, a check of
    health behind a thousand calls would also wait for the work of them all; so that work comes after the handing over.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._ticking = False
        self._came = 0
        self._skipped = 0

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if not handler_call_details.method.startswith(OPEN_SERVICES):
            await self._turn()
        return await continuation(handler_call_details)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        self._came += 1
        if not self._ticking:
            self._ticking = True
            loop.call_later(TICK_SECONDS, self._tick)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _tick(self) -> None:
        if self._came > FLOOD and self._skipped < MAX_SKIPPED:
            self._skipped += 1
        else:
            self._skipped = 0
            for _ in range(PER_TICK):
                self._let_in()
        self._came = 0
        if self._ticking:
            asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def _let_in(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # a cancelled call waits no more
                turn.set_result(None)
                return
        self._ticking = False


class RefusalPace:
    """How late a refusal is answered, so that those of one tenant come at a bounded pace (a leaky bucket as a meter).

    So a client that repeats what is refused, as one does that retries without end, costs others no more than that. An
    answer that itself says when to come again, such as that of a server that is busy, is not late. Administrators count
    as one tenant, and callers without a valid key as another.

    Args:
        per_second: refusals of one tenant.
        burst: of them at once.
        clock: seconds, monotonic.
    """

    MAX_CALLERS = 4096

    def __init__(
        self,
        per_second: float = REFUSALS_PER_SECOND,
        burst: float = BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._even_at: OrderedDict[Hashable, float] = OrderedDict()

    def delay(self, error: DeltamuxError) -> float:
        """Counts an error of the RPC that runs in this task, and returns the seconds by which its answer is late."""
        if error.retry_after is not None:
            return 0.0
        return self.count(CURRENT.get(None), 1.0 + request_bytes.get() / BYTES_PER_REFUSAL)

    def count(self, caller: Hashable, refusals: float) -> float:
        """Counts refusals of a caller, and returns the seconds by which the answer to the last one is late."""
        now, burst_seconds = self._clock(), self._burst / self._per_second
        even_at = max(now, self._even_at.pop(caller, now)) + refusals / self._per_second
        late = min(max(even_at - now - burst_seconds, 0.0), MAX_DELAY)
        # What goes beyond the longest delay is forgotten: one that mends its ways is soon answered at once.
        self._even_at[caller] = min(even_at, now + burst_seconds + MAX_DELAY)
        if len(self._even_at) > self.MAX_CALLERS:
            self._even_at.popitem(last=False)
        return late
