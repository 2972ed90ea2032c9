"""Streams whose client does not read: they are given up, so that they hold nothing that others need."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Any

from deltamux.errors import DeadlineExceededError, ResourceExhaustedError
from deltamux.server.access.caller import CURRENT

UNREAD_SECONDS = 60.0
"""A response that the client's window has no room for waits so long. gRPC takes some 64 KiB off the server's hands."""

MAX_UNREAD = 64
"""Streams of one caller that are given up and not over: gRPC keeps what was sent until the client reads it or goes."""

RETRY_SECONDS = 30.0


class Unread:
    """The streams that were given up, by caller."""

    def __init__(self) -> None:
        self._given_up: Counter[Hashable] = Counter()

    def _check(self) -> None:
        """Raises ResourceExhaustedError if the caller has left too many streams unread to begin another."""
        if self._given_up[CURRENT.get(None)] >= MAX_UNREAD:
            raise ResourceExhaustedError(
                f"{MAX_UNREAD} streams of this caller are open that it does not read: read them to their end, or "
                "cancel them",
                reason="STREAM_NOT_READ",
                metadata={"limit": str(MAX_UNREAD)},
                retry_after=RETRY_SECONDS,
            )

    async def send(self, context: Any, responses: AsyncGenerator[Any, Any]) -> None:
        """Sends all responses; closes their generator as soon as the client does not read.

        Raises:
            DeadlineExceededError: once the client reads again: what it did not read goes out before any status.
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
            self._given_up[caller] += 1
            closing.append(loop.create_task(responses.aclose()))

        timer = loop.call_later(UNREAD_SECONDS, cancel)
        try:
            yield
        finally:
            timer.cancel()
            if closing:
                await asyncio.wait(closing)
                self._given_up[caller] -= 1
                self._given_up = +self._given_up
        if closing:
            raise DeadlineExceededError(
                f"the client had read nothing of the stream for {UNREAD_SECONDS:g} s, and it was given up; call again",
                reason="STREAM_NOT_READ",
            )
