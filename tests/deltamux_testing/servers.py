"""Servers in the test's own process, over a real socket, with a small engine in torch in place of vLLM."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamux.client import AsyncClient
from deltamux.server.app import EngineFactory, running
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.options import ServeOptions
from deltamux.store import AdapterStore
from deltamux_testing.reference_engine import ReferenceEngine


@dataclass(frozen=True)
class Served:
    """A server that accepts calls.

    Attributes:
        engine: what generates, unless the server was started with a factory of engines.
    """

    address: str
    engine: ReferenceEngine
    store: AdapterStore

    @property
    def admin_key(self) -> str:
        return (self.store.root / "admin.key").read_text().strip()

    def client(self, **options: Any) -> AsyncClient:
        """Returns a client that sends nothing twice, unless it is told to."""
        return AsyncClient(self.address, **{"timeout": 60, "retries": 0, **options})


@dataclass(frozen=True)
class Servers:
    """Starts servers for a base, all of them on one store."""

    base: Path
    store: Path
    compiler: Compiler

    @asynccontextmanager
    async def __call__(
        self, factory: EngineFactory | None = None, *, base: Path | None = None, step_seconds: float = 0.0, **given: Any
    ) -> AsyncIterator[Served]:
        """Runs a server with the given options of `deltamux serve`; its engine pauses after every token."""
        engine = ReferenceEngine(base or self.base, step_seconds=step_seconds)
        common = {"store": self.store, "listen": "127.0.0.1:0", "drain_seconds": 5.0}
        options = ServeOptions(model=str(base or self.base), **{**common, **given})
        async with running(options, factory or (lambda _: engine), self.compiler) as server:
            yield Served(server.address, engine, server.store)
