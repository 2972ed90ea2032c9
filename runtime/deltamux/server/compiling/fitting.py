"""`Fitting`: which of the installed methods fit the engine's base."""

import asyncio

from deltamux.deltas import BaseModel, BaseSupport
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.compiling.job import encode_base


class Fitting:
    """The methods that train, and whether their adapters fit a base; found at the first call, method by method."""

    def __init__(self, compiler: Compiler, base: BaseModel) -> None:
        self._compiler = compiler
        self._base = base
        self._encoded = ""
        # Found once, whoever waits for it: a caller that gives up does not make the next one begin anew.
        self._finding: dict[str, asyncio.Task[str | None]] = {}

    async def refusals(self, support: BaseSupport) -> dict[str, str]:
        """Returns why a method's adapters do not fit, by its name; "" of those that do.

        Args:
            support: what the engine takes; the same after each of its starts.
        Raises:
            UnavailableError: the compiler process does not run.
        """
        self._encoded = self._encoded or encode_base(self._base, support)
        found = {name: await self._refusal(name) for name in self._compiler.methods}
        return {name: refusal for name, refusal in found.items() if refusal is not None}

    async def _refusal(self, method: str) -> str | None:
        task = self._finding.get(method)
        if task is None or _has_failed(task):
            task = self._finding[method] = asyncio.create_task(self._compiler.refusal(method, self._encoded))
        return await asyncio.shield(task)


def _has_failed(task: asyncio.Task[str | None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
