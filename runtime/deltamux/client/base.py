"""`BaseClient`: the parts that the clients for threads and for asyncio share."""

from typing import Any, ClassVar

import grpc

from deltamux.client.calls import Call
from deltamux.client.channel import Connection
from deltamux.client.retrying import RETRIES, Attempts
from deltamux.v1.adapters_pb2_grpc import AdaptersStub
from deltamux.v1.inference_pb2_grpc import InferenceStub
from deltamux.v1.tenants_pb2_grpc import TenantsStub


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

    def _attempts(self, call: Call[Any], timeout: float | None) -> Attempts:
        return Attempts(call, self._connection.retries, timeout if timeout is not None else self._connection.timeout)

    def _start(self, call: Call[Any], attempts: Attempts) -> Any:
        service, _, method = call.method.partition(".")
        return getattr(self._stubs[service], method)(
            attempts.request(), timeout=attempts.timeout(), metadata=self._connection.metadata()
        )
