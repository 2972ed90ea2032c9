"""The client for asyncio, with the methods of `deltamux.client.sync`."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, TypeVar

import grpc

from deltamux.client import calls
from deltamux.client.base import BaseClient
from deltamux.client.calls import Call, Page, Prompt
from deltamux.client.channel import error_of
from deltamux.client.results import Adapter, AdapterEvent, AdapterVersion, ApiKey, Generation, Tenant
from deltamux.client.uploads import Progress, upload_call

T = TypeVar("T")


class AsyncClient(BaseClient):
    """A connection to a deltamux server for one event loop. Close it, or use it as an async context manager.

    Arguments, methods and errors are those of `deltamux.client.Client`.
    """

    _grpc: ClassVar[Any] = grpc.aio

    async def close(self) -> None:
        """Closes the connection and cancels running calls."""
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
        """Generates to the end and returns the whole text."""
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
        """Uploads an adapter's directory as a new version; the same content again is the same version."""
        call = upload_call(name, path, method=method, promote=promote, labels=labels, progress=progress)
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
        """Composes several versions to a new one."""
        return await self._unary(calls.compose(name, parts, mode, promote, labels or {}))

    async def promote(self, name: str, *, version: int, canary_percent: int = 0) -> Adapter:
        """Makes a version the serving one, or the canary with a share of the traffic in percent."""
        return await self._unary(calls.promote(name, version, canary_percent))

    async def rollback(self, name: str) -> Adapter:
        """Ends a canary; without one, returns to the version that served before."""
        return await self._unary(calls.rollback(name))

    async def delete_adapter(self, name: str) -> None:
        """Deletes an adapter, or one version that does not serve; running requests are not affected."""
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
        """Deletes a tenant and its keys; with `force` also its adapters."""
        return await self._unary(calls.delete_tenant(name, force))

    async def create_api_key(self, tenant: str) -> ApiKey:
        """Creates a key for ``tenants/{tenant}``; its secret is in this result only."""
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
