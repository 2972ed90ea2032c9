"""Every request, before its RPC runs: one that cannot be decoded, or is larger than its bounds, is INVALID_ARGUMENT."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

import grpc

from deltamux.errors import DeltamuxError, InvalidArgumentError
from deltamux.server.transport.interceptors import KINDS, Context
from deltamux.server.transport.limits import check_limits, max_bytes
from deltamux.server.transport.pacing import request_bytes
from deltamux.v1 import adapters_pb2, inference_pb2, tenants_pb2

REQUESTS: Mapping[str, str] = {
    f"/{service.full_name}/{method.name}": method.input_type.name
    for file in (inference_pb2, adapters_pb2, tenants_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Name of the message that each method takes, by its path."""


class Refused(NamedTuple):
    """Stands where a request would; gRPC has no status for a deserialiser that raises."""

    error: DeltamuxError


class CheckedRequests(grpc.aio.ServerInterceptor):
    """Decodes and checks every request. It comes last, so that what it raises meets the interceptors before it.

    Attributes:
        max_model_len: the context's length in tokens, which bounds what a prompt may have; known once an engine has
            started.
    """

    def __init__(self) -> None:
        self.max_model_len = 0

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(handler_call_details)
        if handler is None:
            return None
        attribute, make = KINDS[handler.request_streaming, handler.response_streaming]
        wrap = _streaming if handler.request_streaming else _unary
        behaviour = wrap(getattr(handler, attribute))
        kind = REQUESTS.get(handler_call_details.method, "")
        read = self._checked(kind, handler.request_deserializer)
        return make(behaviour, read, handler.response_serializer)

    def _checked(self, kind: str, deserialise: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
        if deserialise is None:
            return None

        def read(raw: bytes) -> Any:
            request_bytes.set(request_bytes.get() + len(raw))
            if len(raw) > (limit := max_bytes(kind, self.max_model_len)):
                return Refused(_too_large(len(raw), limit))
            try:
                message = deserialise(raw)
                check_limits(message)
            except InvalidArgumentError as error:
                return Refused(error)
            except Exception as error:
                return Refused(_undecodable(raw, error))
            return message

        return read


def _unary(inner: Callable[[Any, Context], Any]) -> Any:
    # Not a coroutine: what a streaming method returns is an asynchronous generator, and passes through as it is.
    def run(request: Any, context: Context) -> Any:
        return inner(_accepted(request), context)

    return run


def _streaming(inner: Callable[[Any, Context], Any]) -> Any:
    def run(requests: AsyncIterator[Any], context: Context) -> Any:
        return inner(_Accepted(requests), context)

    return run


class _Accepted:
    """The requests of a stream, each as `_accepted` returns it."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = aiter(requests)

    def __aiter__(self) -> _Accepted:
        return self

    async def __anext__(self) -> Any:
        return _accepted(await anext(self._requests))


def _accepted(request: Any) -> Any:
    if isinstance(request, Refused):
        raise request.error
    return request


def _too_large(size: int, limit: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the request has {size} bytes; this server takes at most {limit} of its kind",
        reason="LIMIT_EXCEEDED",
        metadata={"field": "request", "size": str(size), "limit": str(limit)},
    )


def _undecodable(raw: bytes, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the request's {len(raw)} bytes cannot be decoded ({type(error).__name__}): send a message of the RPC's type, "
        "its text in UTF-8",
        reason="UNDECODABLE",
    )
