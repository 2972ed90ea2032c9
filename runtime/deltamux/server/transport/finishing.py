"""Work that goes on to its end when its caller goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Runs work that must not stop half way; a cancellation of the caller is raised once it has ended.

    A thread that changes the store is not ended by a cancellation: what goes with the change, such as telling watchers
    of it, must not be either, nor may the files that it works on go before.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody is left to hear of it
        raise
