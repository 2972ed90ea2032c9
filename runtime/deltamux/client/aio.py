"""The client for asyncio, with the methods of `deltamux.client.sync`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import grpc

from deltamux.client import calls, uploads
from deltamux.client.base import BaseClient, as_method
from deltamux.client.calls import Call, Listing
from deltamux.client.channel import error_of

T = TypeVar("T")
P = ParamSpec("P")


def _unary(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """Returns the method that sends a call and returns its result."""

    async def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await client._unary(build(*args, **kwargs))

    return as_method(method, build)


def _listing(build: Callable[P, Listing[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, list[T]]]:
    """Returns the method that returns the entries of all pages."""

    async def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> list[T]:
        listing, found = build(*args, **kwargs), list[T]()
        while True:
            found += listing.entries(page := await client._unary(listing.call))
            if not page.next_page_token:
                return found

    return as_method(method, build, list)


def _stream(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    """Returns the method that yields the results of a call as they come."""

    def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return client._stream(build(*args, **kwargs))

    return as_method(method, build, AsyncIterator)


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

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    generate = _unary(calls.generate)
    generate_stream = _stream(calls.generate_stream)
    upload_adapter = _unary(uploads.upload_adapter)
    get_base = _unary(calls.get_base)
    get_adapter = _unary(calls.get_adapter)
    get_adapter_version = _unary(calls.get_adapter_version)
    list_adapters = _listing(calls.list_adapters)
    list_adapter_versions = _listing(calls.list_adapter_versions)
    compose_adapter = _unary(calls.compose_adapter)
    promote = _unary(calls.promote)
    rollback = _unary(calls.rollback)
    delete_adapter = _unary(calls.delete_adapter)
    pin_adapter = _unary(calls.pin_adapter)
    unpin_adapter = _unary(calls.unpin_adapter)
    watch_adapters = _stream(calls.watch_adapters)
    create_tenant = _unary(calls.create_tenant)
    get_tenant = _unary(calls.get_tenant)
    list_tenants = _listing(calls.list_tenants)
    delete_tenant = _unary(calls.delete_tenant)
    create_api_key = _unary(calls.create_api_key)
    list_api_keys = _listing(calls.list_api_keys)
    delete_api_key = _unary(calls.delete_api_key)

    async def _unary(self, call: Call[T]) -> T:
        attempts = self._attempts(call)
        while True:
            try:
                return call.read(await self._start(call, attempts))
            except grpc.aio.AioRpcError as raised:
                error = error_of(raised)
                if (pause := attempts.pause(error)) is None:
                    raise error from raised
            await asyncio.sleep(pause)

    async def _stream(self, call: Call[T]) -> AsyncIterator[T]:
        attempts = self._attempts(call)
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
