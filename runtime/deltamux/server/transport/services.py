"""The services of a server that listens before its engine has started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from deltamux.errors import UnavailableError
from deltamux.server.transport.interceptors import Context

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
RETRY_SECONDS = 5.0


class Services(grpc.GenericRpcHandler):
    """A handler of the services added so far; calls to others are UNAVAILABLE until `complete`, then UNIMPLEMENTED.

    It takes the place of a gRPC server in the generated ``add_..._to_server`` functions, which do not work on a started
    server.

    Attributes:
        health: the standard health service, available from the beginning.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.health = health.aio.HealthServicer()
        self._names = names
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._complete = False
        self.add(health_pb2_grpc.add_HealthServicer_to_server, self.health)

    def add(self, add_to_server: Any, servicer: Any) -> None:
        """Adds a servicer with its generated function."""
        add_to_server(servicer, self)

    async def start(self, server: grpc.aio.Server) -> None:
        """Starts a server with these services; its health is NOT_SERVING."""
        for name in ("", *self._names):
            await self.health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        server.add_generic_rpc_handlers((self,))
        await server.start()

    def complete(self) -> None:
        """Marks all services as added."""
        self._complete = True

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        for handler in self._handlers:
            if (found := handler.service(handler_call_details)) is not None:
                return found
        return None if self._complete else _STARTING

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Adds nothing: the same handlers are added as generic ones."""


async def _starting(request: bytes, context: Context) -> bytes:
    raise UnavailableError(
        "the server is starting: its model is being loaded; try again once its health is SERVING",
        reason="SERVER_STARTING",
        retry_after=RETRY_SECONDS,
    )


_STARTING: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(_starting)
"""For calls of every kind, as it answers the first message with an error."""
