"""`BaseClient`: the parts that the clients for threads and for asyncio share."""

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, ClassVar, TypeVar, get_args

import grpc

from deltamux.client.calls import Call
from deltamux.client.channel import Connection
from deltamux.client.retrying import RETRIES, Attempts
from deltamux.v1.adapters_pb2_grpc import AdaptersStub
from deltamux.v1.inference_pb2_grpc import InferenceStub
from deltamux.v1.tenants_pb2_grpc import TenantsStub

M = TypeVar("M", bound=Callable[..., Any])


def as_method(method: M, build: Callable[..., Any], container: Any = None) -> M:
    """Returns a client's method with the name, docstring and signature of the function that builds its call.

    Args:
        container: what the method returns the results in, such as list; None: it returns the one result.
    """
    signature = inspect.signature(build)
    (result,) = get_args(signature.return_annotation)
    parameters = (inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *signature.parameters.values())
    described: Any = update_wrapper(method, build)
    described.__signature__ = signature.replace(
        parameters=parameters, return_annotation=container[result] if container else result
    )
    return method


class BaseClient:
    """A channel with its stubs."""

    _grpc: ClassVar[Any] = grpc
    """The module that makes channels: `grpc` or `grpc.aio`."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: bool | bytes = False,
        timeout: float | None = None,
        retries: int = RETRIES,
    ) -> None:
        self._connection = Connection(address, api_key, tls, timeout, retries)
        self._channel = self._connection.channel(self._grpc)
        self._stubs: dict[str, Any] = {
            "Inference": InferenceStub(self._channel),
            "Adapters": AdaptersStub(self._channel),
            "Tenants": TenantsStub(self._channel),
        }

    def _attempts(self, call: Call[Any]) -> Attempts:
        timeout = self._connection.timeout if call.timeout is None else call.timeout
        return Attempts(call, self._connection.retries, timeout)

    def _start(self, call: Call[Any], attempts: Attempts) -> Any:
        service, _, method = call.method.partition(".")
        return getattr(self._stubs[service], method)(
            attempts.request(), timeout=attempts.timeout(), metadata=self._connection.metadata()
        )
