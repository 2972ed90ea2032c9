"""More work than the server's limits, over a real socket: every caller gets a result or a retry time."""

from __future__ import annotations

import asyncio
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]  # its .pyi files come without py.typed
from grpc_status import rpc_status

from deltamux.client import AsyncClient
from deltamux.client.retrying import RETRIES
from deltamux.client.uploads import upload_messages
from deltamux.errors import ResourceExhaustedError
from deltamux.server.rpc.events import MAX_WATCHES
from deltamux.v1 import adapters_pb2 as pb
from deltamux.v1 import inference_pb2
from deltamux.v1.adapters_pb2_grpc import AdaptersStub
from deltamux.v1.inference_pb2_grpc import InferenceStub
from deltamux_testing.raw_http2 import HEADERS, PREFACE, RST_STREAM, SETTINGS, frame, headers
from deltamux_testing.servers import Served, Servers
from deltamux_testing.stalled_uploads import StalledUploads

ACME, GLOBEX = "tenants/acme/adapters/tickets", "tenants/globex/adapters/tickets"


def retry_delay(error: grpc.RpcError) -> float | None:
    """Returns the seconds of a status's RetryInfo."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an RpcError of a call is a Call, too
    for detail in status.details if status is not None else ():
        info = error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds() / 1000)
    return None


@pytest.mark.slow
async def test_each_of_thousands_of_concurrent_calls_is_served_or_refused_with_retry_info(serve: Servers) -> None:
    channels = 2

    def call(address: str) -> Counter[str]:
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(values=[5, 6]))
        request.sampling.max_tokens = 1
        own = [("grpc.use_local_subchannel_pool", 1)]
        opened = [grpc.insecure_channel(address, options=own) for _ in range(channels)]
        stubs = [InferenceStub(channel) for channel in opened]
        futures = [stubs[number % channels].Generate.future(request, timeout=120) for number in range(2500)]
        outcomes = Counter(outcome(future) for future in futures)
        for channel in opened:
            channel.close()
        return outcomes

    def outcome(future: Any) -> str:
        error = future.exception()
        if error is None:
            return "served"
        return f"{error.code().name}{'' if retry_delay(error) is None else ' with a time to come back'}"

    async with serve(max_pending_requests=50) as server:
        outcomes = await asyncio.to_thread(call, server.address)
    assert set(outcomes) == {"served", "RESOURCE_EXHAUSTED with a time to come back"}
    assert outcomes["served"] >= 50


async def test_a_tenant_that_holds_its_slots_for_long_keeps_no_other_out(serve: Servers, loras: list[Path]) -> None:
    async with (
        serve(max_pending_requests=4, step_seconds=0.5) as server,
        server.client() as client,
        AsyncExitStack() as stack,
    ):
        for name, files in zip((ACME, GLOBEX), loras, strict=True):
            await client.upload_adapter(name, files)
        for _ in range(3):
            stream: Any = client.generate_stream("a", adapter=ACME, max_tokens=400)
            await anext(await stack.enter_async_context(aclosing(stream)))
        with pytest.raises(ResourceExhaustedError, match="3 of at most 4 generations"):
            await client.generate("a", adapter=ACME, max_tokens=1)
        assert (await client.generate("a", adapter=GLOBEX, max_tokens=1)).adapter_version == f"{GLOBEX}/versions/1"


@pytest.mark.parametrize(
    ("permits", "calls", "name"), [(4, 8, ACME), (1, 5, None)], ids=["after their header", "before it"]
)
async def test_uploads_of_one_tenant_that_stall_do_not_keep_another_from_uploading(
    permits: int, calls: int, name: str | None, serve: Servers, loras: list[Path]
) -> None:
    """A call that has sent nothing takes no permit."""
    async with (
        serve(max_concurrent_uploads=permits) as server,
        server.client(retries=RETRIES) as client,
        StalledUploads(server.address, loras[0]) as stalled,
    ):
        await stalled.begin(calls, name)
        began = time.monotonic()
        assert (await client.upload_adapter(GLOBEX, loras[0])).state == "READY"
        assert time.monotonic() - began < 20


@pytest.mark.slow
async def test_tenants_that_stall_together_keep_another_from_uploading_for_seconds_at_most(
    serve: Servers, loras: list[Path]
) -> None:
    async with (
        serve(max_concurrent_uploads=4, upload_min_bytes_per_second=1 << 20) as server,
        server.client(retries=RETRIES) as client,
        StalledUploads(server.address, loras[0]) as stalled,
    ):
        for tenant in ("acme", "hooli", "initech"):
            await stalled.begin(6, f"tenants/{tenant}/adapters/tickets")
        for number in range(3):
            began = time.monotonic()
            assert (await client.upload_adapter(GLOBEX, loras[number % 2])).state == "READY"
            assert time.monotonic() - began < 8


@pytest.mark.slow
async def test_an_upload_waits_for_those_that_stall_to_be_given_up(serve: Servers, loras: list[Path]) -> None:
    async with (
        serve(max_concurrent_uploads=1, upload_idle_seconds=1.0) as server,
        server.client(retries=RETRIES) as client,
        StalledUploads(server.address, loras[0]) as stalled,
    ):
        await stalled.begin(2, ACME)
        assert (await client.upload_adapter(GLOBEX, loras[0])).state == "READY"


async def test_an_upload_that_trickles_is_given_up_for_its_rate(serve: Servers, loras: list[Path]) -> None:
    header, first, *_ = upload_messages(ACME, loras[0])

    async def trickle() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield header
        for place in range(len(first.chunk.data)):
            chunk = pb.FileChunk(path=first.chunk.path, data=first.chunk.data[place : place + 1])
            yield pb.UploadAdapterRequest(chunk=chunk)
            await asyncio.sleep(0.05)

    async with serve(upload_idle_seconds=1.0, upload_min_bytes_per_second=1 << 20) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            began = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError, match="less than 1048576 bytes per second") as refused:
                await AdaptersStub(channel).UploadAdapter(trickle(), timeout=60)
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() - began < 10
        async with server.client() as client:
            assert (await client.upload_adapter(ACME, loras[0])).state == "READY"


async def test_calls_that_are_reset_at_once_are_refused_before_the_server_handles_them(
    served: Served, client: AsyncClient
) -> None:
    begun = 15_000
    host, port = served.address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + frame(SETTINGS, 0, 0))
    for stream in range(1, 2 * begun, 2):
        writer.write(frame(HEADERS, 4, stream, headers("/any")) + frame(RST_STREAM, 0, stream, b"\0\0\0\x08"))
    await writer.drain()
    refused = 0
    async with asyncio.timeout(60):
        while refused < begun // 2:
            size, kind = struct.unpack(">I", b"\0" + await reader.readexactly(3))[0], (await reader.readexactly(1))[0]
            await reader.readexactly(5 + size)
            refused += kind == RST_STREAM
    writer.close()
    assert await client.list_tenants() == []


async def test_a_tenant_is_watched_so_many_times_at_once_and_another_all_the_same(
    served: Served, client: AsyncClient, loras: list[Path]
) -> None:
    for name in (ACME, GLOBEX):
        await client.upload_adapter(name, loras[0])
    async with grpc.aio.insecure_channel(served.address) as channel:

        def watch(parent: str) -> Any:
            return AdaptersStub(channel).WatchAdapters(pb.WatchAdaptersRequest(parent=parent))

        watches = [watch("tenants/acme") for _ in range(MAX_WATCHES)]
        await asyncio.gather(*(each.read() for each in watches))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await watch(ACME).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_delay(refused.value)
        assert (await watch(GLOBEX).read()).adapter.name == GLOBEX
        watches[0].cancel()
        async with asyncio.timeout(10):
            while True:
                try:
                    assert (await watch(ACME).read()).adapter.name == ACME
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)
