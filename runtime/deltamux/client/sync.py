"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Self, TypeVar

import grpc

from deltamux.client import calls, uploads
from deltamux.client.base import BaseClient, as_method
from deltamux.client.calls import Call, Listing
from deltamux.client.channel import error_of

T = TypeVar("T")
P = ParamSpec("P")


def _unary(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """Returns the method that sends a call and returns its result."""

    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client._unary(build(*args, **kwargs))

    return as_method(method, build)


def _listing(build: Callable[P, Listing[T]]) -> Callable[Concatenate[Client, P], list[T]]:
    """Returns the method that returns the entries of all pages."""

    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> list[T]:
        listing, found = build(*args, **kwargs), list[T]()
        while True:
            found += listing.entries(page := client._unary(listing.call))
            if not page.next_page_token:
                return found

    return as_method(method, build, list)


def _stream(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    """Returns the method that yields the results of a call as they come."""

    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return client._stream(build(*args, **kwargs))

    return as_method(method, build, Iterator)


class Client(BaseClient):
    """A connection to a deltamux server; safe to share between threads. Close it, or use it as a context manager.

    Args:
        address: ``host:port`` or ``unix:path``.
        api_key: sent with every call, if the server requires one.
        tls: True for the system's root certificates, or PEM bytes of the authority to trust.
        timeout: deadline of a call in seconds, retries included; None for none.
        retries: most attempts after the first, of reads, uploads, and generations of which no token was received, that
            were refused with RetryInfo, after the time in it. 0 for none.

    Every method raises `deltamux.errors.DeltamuxError`; each error has ``.code`` (a grpc.StatusCode), ``.reason`` and
    ``.metadata``. Their arguments are those of the functions of the same names in `deltamux.client.calls`.
    """

    def close(self) -> None:
        """Closes the connection and cancels running calls."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

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

    def _unary(self, call: Call[T]) -> T:
        attempts = self._attempts(call)
        while True:
            try:
                return call.read(self._start(call, attempts))
            except grpc.RpcError as raised:
                error = error_of(raised)
                if (pause := attempts.pause(error)) is None:
                    raise error from raised
            time.sleep(pause)

    def _stream(self, call: Call[T]) -> Iterator[T]:
        attempts = self._attempts(call)
        begun = False
        while True:
            stream = self._start(call, attempts)
            try:
                for message in stream:
                    begun = True
                    yield call.read(message)
                return
            except grpc.RpcError as raised:
                error = error_of(raised)
                pause = None if begun else attempts.pause(error)
                if pause is None:
                    raise error from raised
            finally:
                stream.cancel()
            time.sleep(pause)
