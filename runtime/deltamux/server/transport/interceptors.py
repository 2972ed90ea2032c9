"""Interceptors of every RPC, streams included: each runs it inside a context manager."""

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import grpc
from grpc_status import rpc_status

from deltamux.errors import DeltamuxError
from deltamux.server.transport.status import status_of
from deltamux.server.transport.unread import UnreadStreams

log = logging.getLogger("deltamux.server")

Context = grpc.aio.ServicerContext[Any, Any]
RpcContextManager = Callable[[str, Context], AbstractAsyncContextManager[None]]
"""Returns the context manager of an RPC from its full name and context; it is left after the last response."""

KINDS: dict[tuple[bool, bool], tuple[str, Any]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""(request streaming, response streaming) to the handler's attribute and the function that makes such a handler."""


class ContextManagerInterceptor(grpc.aio.ServerInterceptor):
    """Runs every RPC inside an async context manager.

    A streaming RPC is inside it for its whole iteration, and its generator is closed before the manager is left: a
    cancelled call, or one whose client does not read (see `UnreadStreams`), frees its resources at once.
    """

    def __init__(self, around: RpcContextManager) -> None:
        self._around = around
        self._unread = UnreadStreams()

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(handler_call_details)
        if handler is None:
            return None
        attribute, make = KINDS[handler.request_streaming, handler.response_streaming]
        wrap = self._streaming if handler.response_streaming else self._unary
        behaviour = wrap(handler_call_details.method, getattr(handler, attribute))
        return make(behaviour, handler.request_deserializer, handler.response_serializer)

    def _unary(self, name: str, inner: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        async def run(request: Any, context: Context) -> Any:
            async with self._around(name, context):
                return await inner(request, context)

        return run

    def _streaming(self, name: str, inner: Callable[[Any, Context], Any]) -> Any:
        # A coroutine that writes: gRPC would not close a generator when a write is cancelled.
        async def run(request: Any, context: Context) -> None:
            async with self._around(name, context):
                result = inner(request, context)
                if not inspect.isasyncgen(result):
                    await result
                    return
                async with aclosing(result) as responses:
                    await self._unread.send(context, responses)

        return run


def map_errors_to_statuses(delay: Callable[[DeltamuxError], float]) -> RpcContextManager:
    """Returns a context manager that maps an RPC's error to its status, and unexpected exceptions to INTERNAL.

    Args:
        delay: returns the seconds by which the status of an error is delayed.
    """

    @asynccontextmanager
    async def around(method: str, context: Context) -> AsyncIterator[None]:
        try:
            yield
            return
        except grpc.aio.AbortError:
            raise
        except DeltamuxError as raised:
            log.info("%s: %s %s: %s", method, raised.status, raised.reason, raised.message)
            error = raised
        except Exception:
            error = _unexpected(method)
        if seconds := delay(error):
            await asyncio.sleep(seconds)
        await context.abort_with_status(rpc_status.to_status(status_of(error)))

    return around


def _unexpected(method: str) -> DeltamuxError:
    """Logs the exception that is being handled, and returns an error without its details for the caller."""
    incident = secrets.token_hex(6)
    log.exception("%s: unexpected, incident %s", method, incident)
    return DeltamuxError(
        f"the server failed unexpectedly; see incident {incident} in its log", metadata={"incident": incident}
    )
