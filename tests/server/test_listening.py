"""The server at the socket: credentials, pings, reflection, and errors without the server's paths."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from deltamux.client import AsyncClient, Client
from deltamux.client.channel import error_of
from deltamux.engine.base import EngineOptions
from deltamux.errors import (
    DeltamuxError,
    FailedPreconditionError,
    InvalidAdapterError,
    InvalidArgumentError,
    UnavailableError,
)
from deltamux.server.app import SERVICES
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.transport.listening import MAX_DESCRIPTORS, raise_descriptor_limit
from deltamux.server.transport.status import status_of, without_paths
from deltamux.v1 import adapters_pb2, tenants_pb2
from deltamux.v1.adapters_pb2_grpc import AdaptersStub
from deltamux.v1.tenants_pb2_grpc import TenantsStub
from deltamux_testing.certificates import write_certificate
from deltamux_testing.reference_engine import ReferenceEngine
from deltamux_testing.servers import Served, Servers

NAME = "tenants/acme/adapters/tickets"


@pytest.fixture(scope="module")
async def guarded(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, shared_compiler: Compiler
) -> AsyncIterator[tuple[str, str]]:
    """The address of a server with keys, and its administrator's key."""
    serve = Servers(tiny_base, tmp_path_factory.mktemp("guarded") / "store", shared_compiler)
    async with serve(auth="keys") as server:
        yield server.address, server.admin_key


async def listed(address: str, *metadata: tuple[str, str]) -> str:
    """Returns "OK", or the reason of the refusal, of a call with these metadata."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            await TenantsStub(channel).ListTenants(tenants_pb2.ListTenantsRequest(), metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            return error_of(error).reason if error.code() is grpc.StatusCode.UNAUTHENTICATED else str(error)
    return "OK"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
async def test_the_scheme_of_the_authorization_is_read_in_any_case(scheme: str, guarded: tuple[str, str]) -> None:
    address, key = guarded
    assert await listed(address, ("authorization", f"{scheme} {key}")) == "OK"


async def test_credentials_that_are_not_one_key_are_refused_with_the_reason(guarded: tuple[str, str]) -> None:
    address, key = guarded
    good = ("authorization", f"Bearer {key}")
    assert await listed(address, ("x-api-key", key)) == "OK"
    assert await listed(address) == "KEY_MISSING"
    assert await listed(address, good, ("authorization", "Bearer other")) == "KEY_AMBIGUOUS"
    assert await listed(address, good, good) == "KEY_AMBIGUOUS"
    assert await listed(address, good, ("x-api-key", key)) == "KEY_AMBIGUOUS"
    assert await listed(address, ("authorization", f"Basic {key}")) == "KEY_SCHEME"
    assert await listed(address, ("authorization", key)) == "KEY_SCHEME"
    assert await listed(address, ("authorization", "Bearer")) == "KEY_MISSING"
    assert await listed(address, ("x-api-key", "dmx_wrong")) == "KEY_UNKNOWN"


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_refused_before_they_are_unpacked(
    compression: grpc.Compression, guarded: tuple[str, str]
) -> None:
    address, key = guarded
    async with grpc.aio.insecure_channel(address, compression=compression) as channel:
        request = tenants_pb2.GetTenantRequest(name="x" * 100_000)
        with pytest.raises(grpc.aio.AioRpcError, match="is disabled") as refused:
            await TenantsStub(channel).GetTenant(request, metadata=[("x-api-key", key)], timeout=20)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.slow
async def test_a_client_that_pings_often_keeps_its_idle_stream(
    served: Served, client: AsyncClient, loras: list[Path]
) -> None:
    await client.upload_adapter(NAME, loras[0])
    pings = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(served.address, options=pings) as channel:
        watch: Any = AdaptersStub(channel).WatchAdapters(adapters_pb2.WatchAdaptersRequest(parent=NAME), timeout=30)
        assert (await watch.read()).type == adapters_pb2.AdapterEvent.STATE
        await asyncio.sleep(4.0)  # the third ping within this time is one too many by default
        await client.pin_adapter(NAME)
        assert (await watch.read()).type == adapters_pb2.AdapterEvent.UPDATED


async def test_a_server_that_loads_its_engine_answers_that_it_starts(serve: Servers) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    loading, goes_on = threading.Event(), threading.Event()

    def load(_: EngineOptions) -> ReferenceEngine:
        loading.set()
        assert goes_on.wait(60)
        return ReferenceEngine(serve.base)

    async def serving() -> None:
        async with serve(load, listen=address) as server, server.client() as client:
            assert len((await client.generate("x", max_tokens=2, ignore_eos=True)).token_ids) == 2
            assert await health(address) == health_pb2.HealthCheckResponse.SERVING
            async with grpc.aio.insecure_channel(address) as channel:
                unknown: Any = channel.unary_unary("/deltamux.v1.Inference/Nothing")
                with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
                    await unknown(b"")

    started = asyncio.create_task(serving())
    assert await asyncio.to_thread(loading.wait, 60)
    assert await health(address) == health_pb2.HealthCheckResponse.NOT_SERVING
    async with AsyncClient(address, timeout=20, retries=0) as client:
        calls = (client.generate("x"), client.list_tenants(), anext(aiter(client.generate_stream("x"))))
        for call in calls:
            with pytest.raises(UnavailableError, match="the server is starting") as refused:
                await call
            assert (refused.value.reason, refused.value.retry_after) == ("SERVER_STARTING", 5.0)
    goes_on.set()
    await started


async def test_an_address_is_free_again_after_a_start_that_failed(serve: Servers) -> None:
    def broken(_: EngineOptions) -> ReferenceEngine:
        raise FailedPreconditionError("no such base")

    async with serve() as server:
        pass
    for _ in range(2):
        with pytest.raises(FailedPreconditionError, match="no such base"):
            async with serve(broken, listen=server.address):
                pass


async def health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(service=SERVICES[0]), timeout=20)).status)


@pytest.mark.slow
async def test_a_client_with_wrong_tls_gets_the_cause_at_once(served: Served, serve: Servers, tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path)
    async with serve(store=tmp_path / "other", tls_cert=cert, tls_key=key) as server:
        port = server.address.rpartition(":")[2]
        cases: list[tuple[str, bool | bytes, str]] = [
            (f"127.0.0.1:{port}", False, "as one with TLS does to a client without"),
            (f"127.0.0.1:{port}", True, "not signed by an authority"),
            (f"127.0.0.1:{port}", cert.read_bytes(), "for another name than this address"),
            (f"127.0.0.1:{port}", b"no certificate", "is not valid PEM"),
            (served.address, True, "does not speak TLS"),
        ]
        for address, tls, problem in cases:
            async with AsyncClient(address, tls=tls, timeout=20) as client:
                with pytest.raises(UnavailableError, match=problem):
                    await client.list_tenants()


OF_ANOTHER_SERVER: dict[str, dict[str, Any]] = {
    "its certificate has expired": {"days": -5},
    "its certificate is not valid yet": {"days": 5},
    "a kind of key that gRPC's clients refuse": {"curve": "Ed25519"},
}


@pytest.mark.parametrize("problem", OF_ANOTHER_SERVER)
async def test_a_client_gets_the_cause_where_a_server_has_a_certificate_that_ours_would_refuse(
    problem: str, tmp_path: Path
) -> None:
    cert, key = write_certificate(tmp_path, **OF_ANOTHER_SERVER[problem])
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    port = server.add_secure_port("[::]:0", credentials)  # at every address of the name
    server.start()
    try:
        async with AsyncClient(f"localhost:{port}", tls=cert.read_bytes(), timeout=20, retries=0) as client:
            with pytest.raises(UnavailableError, match=problem):
                await client.list_tenants()
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("address", ["", " ", "http://localhost:1", "localhost:65537", f"h:{'9' * 5000}", "dns:///"])
async def test_a_client_refuses_an_address_that_is_none_or_would_lead_elsewhere(address: str) -> None:
    with pytest.raises(InvalidArgumentError, match="the server's address") as refused:
        async with AsyncClient(address, timeout=20) as client:
            await client.list_tenants()
    assert refused.value.metadata == {"field": "address"}


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_and_describes_every_service_in_both_versions(version: str, served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        call: Any = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )(timeout=20)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {service.name for service in (await call.read()).list_services_response.service}
        own = {f"grpc.reflection.{each}.ServerReflection" for each in ("v1", "v1alpha")}
        assert names >= {*SERVICES, "grpc.health.v1.Health", *own}
        for name in names:
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
            files = (await call.read()).file_descriptor_response.file_descriptor_proto
            assert any(name.rpartition(".")[2].encode() in file for file in files), name
        await call.done_writing()
    assert descriptor_pool.Default().FindServiceByName("grpc.reflection.v1.ServerReflection")


@pytest.mark.parametrize("given", [{"timeout": 0}, {"timeout": -1}, {"timeout": float("nan")}, {"retries": -1}])
def test_a_client_refuses_what_no_call_can_keep(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="must be"):
        Client("127.0.0.1:1", **given)


SHOWN = {
    "program {tmp}/objects/ab/program.safetensors is damaged": "program …/program.safetensors is damaged",
    "[Errno 2] No such file: '{tmp}/my store/x.json'": "[Errno 2] No such file: '…/x.json'",
    'File "{tmp}/site packages/a.py", line 3': 'File "…/a.py", line 3',
    "({tmp}/a/b), {tmp}/c: no": "(…/b), …/c: no",
    "file://{tmp}/a/b": "file:…/b",
    "tenants/acme/adapters/tickets does not exist": "tenants/acme/adapters/tickets does not exist",
    "3/4 of /4 and / or '#/definitions/a' '/nowhere/a'": "3/4 of /4 and / or '#/definitions/a' '/nowhere/a'",
}


@pytest.mark.parametrize("text", SHOWN)
def test_paths_of_the_server_lose_their_directories_in_messages_to_clients(text: str) -> None:
    assert without_paths(text.format(tmp="/tmp/store")) == SHOWN[text]
    error = InvalidAdapterError(text.format(tmp="/tmp/store"), metadata={"file": text.format(tmp="/tmp/store")})
    assert b"/tmp/store" not in status_of(error).SerializeToString()


async def test_an_error_over_a_lost_file_names_no_directory_of_the_store(
    served: Served, client: AsyncClient, loras: list[Path], tmp_path: Path
) -> None:
    await client.upload_adapter(NAME, loras[0], promote=False)
    await served.engine.evict((await client.get_adapter_version(f"{NAME}/versions/1")).digest)
    for program in (tmp_path / "store").rglob("program.safetensors"):
        os.truncate(program, 100)
    with pytest.raises(DeltamuxError) as refused:
        await client.generate("x", adapter=f"{NAME}/versions/1", max_tokens=1)
    assert str(tmp_path) not in refused.value.message + str(refused.value.metadata)


def test_a_server_takes_as_many_descriptors_as_it_may_have() -> None:
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        raise_descriptor_limit()
        soft, kept = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == (MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS))
        assert kept == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
