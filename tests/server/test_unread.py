"""Streams that their client does not read: they are cancelled, free their resources, and are bounded in number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from deltamux.errors import DeltamuxError
from deltamux.server.transport import unread
from deltamux.server.transport.interceptors import ContextManagerInterceptor, map_errors_to_statuses
from deltamux_testing.raw_http2 import RawConnection
from deltamux_testing.waiting import until

PATH = "/test.Streams/Endless"
PATIENCE = 30.0


class Endless(grpc.GenericRpcHandler):
    """Streams that end with their client, or are ended; `open` are under way."""

    def __init__(self) -> None:
        self.open = 0
        self.begun = 0

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def stream(request: bytes, context: Any) -> AsyncGenerator[bytes]:
            self.open, self.begun = self.open + 1, self.begun + 1
            try:
                while True:
                    yield bytes(1 << 17)
                    await asyncio.sleep(0.01)
            finally:
                self.open -= 1

        return grpc.unary_stream_rpc_method_handler(stream)


@pytest.fixture
async def endless(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, Endless]]:
    monkeypatch.setattr(unread, "UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(unread, "MAX_UNREAD", 4)
    streams = Endless()

    def at_once(_: DeltamuxError) -> float:
        return 0.0

    server = grpc.aio.server(interceptors=[ContextManagerInterceptor(map_errors_to_statuses(at_once))])
    server.add_generic_rpc_handlers((streams,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", streams
    await server.stop(None)


async def read(address: str, count: int = 1) -> str:
    """Returns "OK" once so many responses of a stream were read, or the status's code."""
    async with grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.unary_stream(PATH)
        call = method(b"", timeout=PATIENCE)
        try:
            for _ in range(count):
                await call.read()
        except grpc.aio.AioRpcError as error:
            return error.code().name
        call.cancel()
        return "OK"


async def test_a_stream_that_is_not_read_ends_while_its_client_stays(endless: tuple[str, Endless]) -> None:
    address, streams = endless
    with RawConnection(address) as client:
        client.call(PATH)
        await until(lambda: streams.begun == 1)
        await until(lambda: streams.open == 0)


async def test_a_stream_that_is_read_goes_on_for_longer(endless: tuple[str, Endless]) -> None:
    assert await read(endless[0], 60) == "OK"


async def test_a_caller_with_many_unread_streams_gets_no_more_until_they_close(endless: tuple[str, Endless]) -> None:
    address, streams = endless
    with ExitStack() as stack:
        client = stack.enter_context(RawConnection(address))
        for _ in range(4):
            client.call(PATH)
        await until(lambda: streams.begun == 4)
        assert await read(address) == "OK"
        await until(lambda: streams.open == 0)
        assert await read(address) == "RESOURCE_EXHAUSTED"
    async with asyncio.timeout(PATIENCE):
        while await read(address) != "OK":  # noqa: ASYNC110 - what runs in gRPC sets no event
            await asyncio.sleep(0.05)
