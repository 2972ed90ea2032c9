"""Rate limits that protect running streams and health checks from floods: of admitted calls, and of the refusals of one
tenant.
"""

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
"""Services without a key or pacing, for load balancers."""

TICK_SECONDS = 0.001
"""Interval between two admissions of calls."""

PER_TICK = 2
"""Calls that are admitted per tick while several wait."""

FLOOD = 3
"""Arrivals in a tick beyond which no waiting call is admitted, so that gRPC hands over the arriving ones first."""

MAX_SKIPPED = 8
"""Longest run of ticks without an admission."""

REFUSALS_PER_SECOND = 50.0
BURST = 50
"""Refusals of one tenant that are answered without delay, after a second without any."""

BYTES_PER_REFUSAL = 1 << 16
"""Bytes of a refused request that count as one more refusal."""

MAX_DELAY = 1.0
"""Longest delay of a refusal in seconds: less than callers' deadlines."""

request_bytes: ContextVar[int] = ContextVar("deltamux_request_bytes", default=0)
"""Bytes that this task's RPC has received."""


class CallPacer(grpc.aio.ServerInterceptor):
    """Admits a few calls per tick, in order, and health checks at once; the outermost interceptor.

    Until it runs or is refused, a call takes about a millisecond of the event loop. gRPC hands over one call per
    iteration of the loop, so a health check that arrives after a thousand calls would wait for the work of all of them;
    the work of waiting calls is therefore done after calls that arrive are handed over.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._ticking = False
        self._arrived = 0
        self._skipped = 0

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if not handler_call_details.method.startswith(OPEN_SERVICES):
            await self._admit()
        return await continuation(handler_call_details)

    async def _admit(self) -> None:
        loop = asyncio.get_running_loop()
        self._arrived += 1
        if not self._ticking:
            self._ticking = True
            loop.call_later(TICK_SECONDS, self._tick)
            return
        admission: asyncio.Future[None] = loop.create_future()
        self._waiting.append(admission)
        await admission

    def _tick(self) -> None:
        if self._arrived > FLOOD and self._skipped < MAX_SKIPPED:
            self._skipped += 1
        else:
            self._skipped = 0
            for _ in range(PER_TICK):
                self._admit_next()
        self._arrived = 0
        if self._ticking:
            asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def _admit_next(self) -> None:
        while self._waiting:
            admission = self._waiting.popleft()
            if not admission.done():  # not cancelled
                admission.set_result(None)
                return
        self._ticking = False


class RefusalPacer:
    """The delay of refusals, so that each tenant's have a bounded rate (a leaky bucket as a meter).

    It bounds the cost of a client that repeats a refused call without end. An error with `retry_after`, such as that of
    a busy server, is not delayed. Administrators count as one tenant, and callers without a valid key as another.

    Args:
        per_second: refusals of one tenant.
        burst: refusals of one tenant without delay.
        clock: seconds, monotonic.
    """

    MAX_CALLERS = 4096

    def __init__(
        self, per_second: float = REFUSALS_PER_SECOND, burst: float = BURST, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._empty_at: OrderedDict[Hashable, float] = OrderedDict()

    def delay(self, error: DeltamuxError) -> float:
        """Counts an error of this task's RPC, and returns the seconds by which its status is delayed."""
        if error.retry_after is not None:
            return 0.0
        return self.count(CURRENT.get(None), 1.0 + request_bytes.get() / BYTES_PER_REFUSAL)

    def count(self, caller: Hashable, refusals: float) -> float:
        """Counts refusals of a caller, and returns the delay of the last one in seconds."""
        now, burst_seconds = self._clock(), self._burst / self._per_second
        empty_at = max(now, self._empty_at.pop(caller, now)) + refusals / self._per_second
        delay = min(max(empty_at - now - burst_seconds, 0.0), MAX_DELAY)
        # Refusals beyond the longest delay are dropped, so that a caller that stops is soon answered without delay.
        self._empty_at[caller] = min(empty_at, now + burst_seconds + MAX_DELAY)
        if len(self._empty_at) > self.MAX_CALLERS:
            self._empty_at.popitem(last=False)
        return delay
