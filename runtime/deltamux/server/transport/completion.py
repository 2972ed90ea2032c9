"""Work that a cancellation of its caller does not stop half way."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Runs work to its end; a cancellation of the caller is raised after it.

    A cancellation does not stop a thread that changes the store; what belongs to the change, such as its event and the
    files that it reads, must not stop before it either.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # the caller is cancelled
        raise
