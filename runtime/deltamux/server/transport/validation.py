"""Validation of requests: one that cannot be decoded, or is larger than its bounds, is INVALID_ARGUMENT."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple, Self

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
"""The name of each method's request message, by the method's path."""


class InvalidRequest(NamedTuple):
    """The error of a request, in its place: gRPC has no status for a deserializer that raises."""

    error: DeltamuxError


class RequestValidator(grpc.aio.ServerInterceptor):
    """Decodes and checks every request; the innermost interceptor, so that the others see its errors.

    Attributes:
        max_model_len: the context's length in tokens, which bounds a prompt; set once the engine has started.
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
        read = self._deserializer(kind, handler.request_deserializer)
        return make(behaviour, read, handler.response_serializer)

    def _deserializer(self, kind: str, deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
        if deserialize is None:
            return None

        def read(raw: bytes) -> Any:
            request_bytes.set(request_bytes.get() + len(raw))
            if len(raw) > (limit := max_bytes(kind, self.max_model_len)):
                return InvalidRequest(_too_large(len(raw), limit))
            try:
                message = deserialize(raw)
                check_limits(message)
            except InvalidArgumentError as error:
                return InvalidRequest(error)
            except Exception as error:
                return InvalidRequest(_undecodable(raw, error))
            return message

        return read


def _unary(inner: Callable[[Any, Context], Any]) -> Any:
    # Not a coroutine: a streaming method returns an asynchronous generator, which is passed on.
    def run(request: Any, context: Context) -> Any:
        return inner(_validated(request), context)

    return run


def _streaming(inner: Callable[[Any, Context], Any]) -> Any:
    def run(requests: AsyncIterator[Any], context: Context) -> Any:
        return inner(_ValidatedStream(requests), context)

    return run


class _ValidatedStream:
    """The requests of a stream, each as `_validated` returns it."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = aiter(requests)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return _validated(await anext(self._requests))


def _validated(request: Any) -> Any:
    if isinstance(request, InvalidRequest):
        raise request.error
    return request


def _too_large(size: int, limit: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the request has {size} bytes; this server allows at most {limit} for this RPC",
        reason="LIMIT_EXCEEDED",
        metadata={"field": "request", "size": str(size), "limit": str(limit)},
    )


def _undecodable(raw: bytes, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the request's {len(raw)} bytes cannot be decoded ({type(error).__name__}): send a message of the RPC's type, "
        "its text in UTF-8",
        reason="UNDECODABLE",
    )
