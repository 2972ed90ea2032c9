"""Standard gRPC health, kept in step with the engine."""

from __future__ import annotations

from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2

from deltamux.engine.supervisor import SupervisedEngine


class HealthMonitor:
    """Sets the serving status of the server and its services to what the engine's supervision finds.

    Args:
        services: full names of the services; those that need the engine, which the whole server ("") does too.
        servicer: the standard one, which says what it is set to.
    """

    def __init__(self, engine: SupervisedEngine, services: Sequence[str], servicer: health.aio.HealthServicer) -> None:
        self._servicer = servicer
        self._engine = engine
        self._services = ("", *services)

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            changed = self._engine.changed
            await self.look()
            await changed.wait()

    async def look(self) -> bool:
        """Looks once and sets the statuses; tells whether the engine serves."""
        serving = self._engine.healthy
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._servicer.set(service, status)
        return serving

    async def stop_serving(self) -> None:
        """Says NOT_SERVING from now on: the server is about to stop."""
        await self._servicer.enter_graceful_shutdown()
