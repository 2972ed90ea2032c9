"""Standard gRPC health, kept in step with the engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2

from deltamux.engine.base import Engine

log = logging.getLogger("deltamux.server")


class HealthMonitor:
    """Looks at the engine and sets the serving status of the server and its services.

    The engine is asked as well as looked at: one whose worker hangs claims to be well, but does not answer.

    Args:
        services: full names of the services; those that need the engine, which the whole server ("") does too.
        interval: seconds between looks.
        ask_interval: seconds between questions.
        patience: seconds that the engine may take to answer.
    """

    def __init__(
        self,
        engine: Engine,
        services: Sequence[str],
        *,
        interval: float = 0.5,
        ask_interval: float = 10.0,
        patience: float = 30.0,
    ) -> None:
        self.servicer = health.aio.HealthServicer()
        self._engine = engine
        self._services = ("", *services)
        self._interval = interval
        self._ask_interval = ask_interval
        self._next_question = 0.0
        self._patience = patience
        self._serving: bool | None = None

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._interval)

    async def look(self) -> bool:
        """Looks once, asks if it is time to, and sets the statuses; tells whether the engine is well."""
        serving = self._engine.healthy and await self._answers()
        if serving != self._serving:
            log.log(logging.INFO if serving else logging.ERROR, "the engine %s", "serves" if serving else "is down")
        self._serving = serving
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self.servicer.set(service, status)
        return serving

    async def stop_serving(self) -> None:
        """Says NOT_SERVING from now on: the server is about to stop."""
        await self.servicer.enter_graceful_shutdown()

    async def _answers(self) -> bool:
        now = asyncio.get_running_loop().time()
        if self._serving and now < self._next_question:
            return True
        self._next_question = now + self._ask_interval
        try:
            async with asyncio.timeout(self._patience):
                await self._engine.ping()
        except TimeoutError:
            log.error("the engine has not answered for %.0f s", self._patience)
            return False
        except Exception:
            log.exception("the engine failed to say how it is")
            return False
        return self._engine.healthy
