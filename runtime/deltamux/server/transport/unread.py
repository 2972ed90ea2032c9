"""Streams whose client does not read them: they are cancelled, to free their permits and KV cache."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Any

from deltamux.errors import DeadlineExceededError, ResourceExhaustedError
from deltamux.server.access.caller import CURRENT

UNREAD_SECONDS = 60.0
"""Longest wait of a response for the client's flow control window. gRPC buffers some 64 KiB before it waits."""

MAX_UNREAD = 64
"""Cancelled streams of one caller that are still open: gRPC keeps their buffers until the client reads or leaves."""

RETRY_SECONDS = 30.0


class UnreadStreams:
    """The cancelled streams that are still open, by caller."""

    def __init__(self) -> None:
        self._cancelled: Counter[Hashable] = Counter()

    def _check(self) -> None:
        """Raises ResourceExhaustedError if the caller has left too many streams unread to begin another."""
        if self._cancelled[CURRENT.get(None)] >= MAX_UNREAD:
            raise ResourceExhaustedError(
                f"this caller has {MAX_UNREAD} open streams that it does not read: read them to the end or cancel them",
                reason="STREAM_NOT_READ",
                metadata={"limit": str(MAX_UNREAD)},
                retry_after=RETRY_SECONDS,
            )

    async def send(self, context: Any, responses: AsyncGenerator[Any, Any]) -> None:
        """Sends all responses; closes their generator when the client does not read for `UNREAD_SECONDS`.

        Raises:
            DeadlineExceededError: the stream was cancelled; raised once the client has read the buffered responses.
        """
        self._check()
        async for response in responses:
            async with self._watched(responses):
                await context.write(response)

    @asynccontextmanager
    async def _watched(self, responses: AsyncGenerator[Any, Any]) -> AsyncIterator[None]:
        caller, loop = CURRENT.get(None), asyncio.get_running_loop()
        closing: list[asyncio.Task[None]] = []

        def cancel() -> None:
            self._cancelled[caller] += 1
            closing.append(loop.create_task(responses.aclose()))

        timer = loop.call_later(UNREAD_SECONDS, cancel)
        try:
            yield
        finally:
            timer.cancel()
            if closing:
                await asyncio.wait(closing)
                self._cancelled[caller] -= 1
                self._cancelled = +self._cancelled
        if closing:
            raise DeadlineExceededError(
                f"the client had not read from the stream for {UNREAD_SECONDS:g} s, and it was cancelled; call again",
                reason="STREAM_NOT_READ",
            )
