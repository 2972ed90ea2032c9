"""The client for asyncio; its surface is the one of `deltamux.client.sync`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import grpc

from deltamux.client import calls
from deltamux.client.calls import Call, Page, Prompt
from deltamux.client.channel import OPTIONS, Connection, error_of
from deltamux.client.results import Adapter, AdapterEvent, AdapterVersion, ApiKey, Generation, Tenant
from deltamux.client.retrying import RETRIES, Attempts
from deltamux.client.uploads import Progress, upload_messages
from deltamux.v1.adapters_pb2_grpc import AdaptersStub
from deltamux.v1.inference_pb2_grpc import InferenceStub
from deltamux.v1.tenants_pb2_grpc import TenantsStub

T = TypeVar("T")


class AsyncClient:
    """A connection to a deltamux server for one event loop. Close it, or use it as an async context manager.

    Arguments, methods and errors are those of `deltamux.client.Client`.
    """

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
        credentials = self._connection.credentials()
        self._channel = (
            grpc.aio.insecure_channel(address, options=OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=OPTIONS)
        )
        self._stubs: dict[str, Any] = {
            "Inference": InferenceStub(self._channel),
            "Adapters": AdaptersStub(self._channel),
            "Tenants": TenantsStub(self._channel),
        }

    async def close(self) -> None:
        """Ends the connection; calls under way are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(
        self, prompt: Prompt, *, adapter: str | None = None, timeout: float | None = None, **sampling: Any
    ) -> Generation:
        """Generates to the end and returns the whole.

        Args:
            prompt: text, token ids, or chat messages (mappings with role and content).
            adapter: resource name of an adapter or of one of its versions; None for the base.
            sampling: max_tokens, temperature, top_p, top_k, min_p, stop, seed, logprobs, json_schema, regex, choice and
                the others of `SamplingParameters` in inference.proto.
        """
        return await self._unary(calls.generate(prompt, adapter, sampling, stream=False), timeout)

    def generate_stream(
        self, prompt: Prompt, *, adapter: str | None = None, timeout: float | None = None, **sampling: Any
    ) -> AsyncIterator[Generation]:
        """Generates and yields increments as they come; closing the iterator aborts. Arguments as for `generate`."""
        return self._stream(calls.generate(prompt, adapter, sampling, stream=True), timeout)

    async def upload_adapter(
        self,
        name: str,
        path: str | Path,
        *,
        method: str = "",
        promote: bool | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> AdapterVersion:
        """Uploads an adapter's directory as a new version; the same content again is the same version.

        Args:
            name: ``tenants/{tenant}/adapters/{adapter}``.
            path: directory with adapter_config.json and adapter_model.safetensors.
            promote: True serves the version at once; None does so for an adapter's first version only.
            progress: told bytes sent and bytes in all.
        """

        def messages() -> Iterator[Any]:
            return upload_messages(name, path, method=method, promote=promote, labels=labels, progress=progress)

        call = Call("Adapters.UploadAdapter", messages(), calls.read_version, again=messages, resend=True)
        return await self._unary(call, timeout)

    async def get_adapter(self, name: str) -> Adapter:
        return await self._unary(calls.get_adapter(name))

    async def get_adapter_version(self, name: str) -> AdapterVersion:
        return await self._unary(calls.get_adapter_version(name))

    async def list_adapters(self, parent: str) -> list[Adapter]:
        """Returns all adapters of ``tenants/{tenant}``."""
        return await self._all(lambda token: calls.list_adapters(parent, token))

    async def list_adapter_versions(self, name: str) -> list[AdapterVersion]:
        return await self._all(lambda token: calls.list_adapter_versions(name, token))

    async def compose_adapter(
        self,
        name: str,
        parts: Mapping[str, float] | Sequence[str],
        *,
        mode: Literal["stack", "sum"] = "stack",
        promote: bool | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> AdapterVersion:
        """Makes a new version of several others, as they are now.

        Args:
            parts: names of adapters or versions, in the order in which they apply; for a sum, with their weights.
            mode: ``stack`` applies one after the other, ``sum`` adds their changes.
        """
        return await self._unary(calls.compose(name, parts, mode, promote, labels or {}))

    async def promote(self, name: str, *, version: int, canary_percent: int = 0) -> Adapter:
        """Makes the adapter's name mean a version; or hands the version a share of the traffic, in percent."""
        return await self._unary(calls.promote(name, version, canary_percent))

    async def rollback(self, name: str) -> Adapter:
        """Ends a canary; or, without one, returns to the version that served before."""
        return await self._unary(calls.rollback(name))

    async def delete_adapter(self, name: str) -> None:
        """Deletes an adapter, or one version that does not serve; requests under way end as they would have."""
        return await self._unary(calls.delete_adapter(name))

    async def pin_adapter(self, name: str) -> Adapter:
        """Keeps the serving version in the engine's memory until `unpin_adapter`."""
        return await self._unary(calls.pin_adapter(name))

    async def unpin_adapter(self, name: str) -> Adapter:
        return await self._unary(calls.unpin_adapter(name))

    def watch_adapters(self, parent: str) -> AsyncIterator[AdapterEvent]:
        """Yields the present state of a tenant's adapters (or of one adapter), then every change, until closed."""
        return self._stream(calls.watch_adapters(parent))

    async def create_tenant(self, tenant: str) -> Tenant:
        return await self._unary(calls.create_tenant(tenant))

    async def get_tenant(self, name: str) -> Tenant:
        return await self._unary(calls.get_tenant(name))

    async def list_tenants(self) -> list[Tenant]:
        return await self._all(calls.list_tenants)

    async def delete_tenant(self, name: str, *, force: bool = False) -> None:
        """Deletes a tenant and its keys; with `force` its adapters, too."""
        return await self._unary(calls.delete_tenant(name, force))

    async def create_api_key(self, tenant: str) -> ApiKey:
        """Makes a key for ``tenants/{tenant}``; its secret is in this answer only."""
        return await self._unary(calls.create_api_key(tenant))

    async def list_api_keys(self, tenant: str) -> list[ApiKey]:
        return await self._all(lambda token: calls.list_api_keys(tenant, token))

    async def delete_api_key(self, name: str) -> None:
        return await self._unary(calls.delete_api_key(name))

    async def _unary(self, call: Call[T], timeout: float | None = None) -> T:
        attempts = self._attempts(call, timeout)
        while True:
            try:
                return call.read(await self._start(call, attempts))
            except grpc.aio.AioRpcError as raised:
                error = error_of(raised)
                if (pause := attempts.pause(error)) is None:
                    raise error from raised
            await asyncio.sleep(pause)

    async def _stream(self, call: Call[T], timeout: float | None = None) -> AsyncIterator[T]:
        attempts = self._attempts(call, timeout)
        begun = False
        while True:
            stream = self._start(call, attempts)
            try:
                async for message in stream:
                    begun = True
                    yield call.read(message)
                return
            except grpc.aio.AioRpcError as raised:
                error = error_of(raised)
                pause = None if begun else attempts.pause(error)
                if pause is None:
                    raise error from raised
            finally:
                stream.cancel()
            await asyncio.sleep(pause)

    async def _all(self, page: Callable[[str], Call[Page[T]]]) -> list[T]:
        found: list[T] = []
        token = ""
        while True:
            answer = await self._unary(page(token))
            found += answer.items
            if not (token := answer.next_token):
                return found

    def _attempts(self, call: Call[Any], timeout: float | None) -> Attempts:
        return Attempts(call, self._connection.retries, timeout if timeout is not None else self._connection.timeout)

    def _start(self, call: Call[Any], attempts: Attempts) -> Any:
        service, _, method = call.method.partition(".")
        return getattr(self._stubs[service], method)(
            attempts.request(), timeout=attempts.timeout(), metadata=self._connection.metadata()
        )
