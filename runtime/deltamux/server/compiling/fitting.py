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
        self._lock = asyncio.Lock()
        self._refusals: dict[str, str] | None = None

    async def refusals(self, support: BaseSupport) -> dict[str, str]:
        """Returns why a method's adapters do not fit, by its name; "" of those that do.

        Args:
            support: what the engine takes; the same after each of its starts.
        Raises:
            UnavailableError: the compiler process does not run.
        """
        async with self._lock:
            if self._refusals is None:
                base = encode_base(self._base, support)
                found = {name: await self._compiler.refusal(name, base) for name in self._compiler.methods}
                self._refusals = {name: refusal for name, refusal in found.items() if refusal is not None}
        return self._refusals
