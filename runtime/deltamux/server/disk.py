"""The threads that wait for the disk in place of the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DiskThreads(ThreadPoolExecutor):
    """A thread pool with an awaitable call."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns what a function returns that is called in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self, partial(function, *args, **kwargs))
