"""The standard gRPC health service, set from the engine's health."""

from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2

from deltamux.engine.supervisor import SupervisedEngine


class HealthMonitor:
    """Sets the serving status of the server and its services from the engine's health.

    Args:
        services: full names of the services; the whole server ("") is set as well.
        servicer: the standard one.
    """

    def __init__(self, engine: SupervisedEngine, services: Sequence[str], servicer: health.aio.HealthServicer) -> None:
        self._servicer = servicer
        self._engine = engine
        self._services = ("", *services)

    async def run(self) -> None:
        """Follows the engine's health until cancelled."""
        while True:
            changed = self._engine.changed
            await self.update()
            await changed.wait()

    async def update(self) -> bool:
        """Sets the statuses once; returns whether the engine serves."""
        serving = self._engine.healthy
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._servicer.set(service, status)
        return serving

    async def stop_serving(self) -> None:
        """Sets NOT_SERVING for good, before the server stops."""
        await self._servicer.enter_graceful_shutdown()
