"""DeleteTenant: running uploads do not restore the tenant, and its watches receive the deletion."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from deltamux.client import AsyncClient
from deltamux.errors import FailedPreconditionError, NotFoundError, UnauthenticatedError
from deltamux.v1 import adapters_pb2 as pb
from deltamux.v1.adapters_pb2_grpc import AdaptersStub
from deltamux_testing.servers import Served, Servers
from deltamux_testing.waiting import until

NAME = "tenants/acme/adapters/tickets"


async def test_an_upload_that_began_before_its_tenant_was_deleted_is_refused(
    served: Served, client: AsyncClient, loras: list[Path]
) -> None:
    await client.upload_adapter(NAME, loras[0])
    files = {name: (loras[1] / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = AdaptersStub(channel).UploadAdapter()
        infos = [pb.FileInfo(path=name, size_bytes=len(data)) for name, data in files.items()]
        await call.write(pb.UploadAdapterRequest(header=pb.UploadHeader(adapter=NAME, files=infos)))
        for name, data in files.items():
            await call.write(pb.UploadAdapterRequest(chunk=pb.FileChunk(path=name, data=data)))
        await until(lambda: list((served.store.root / "staging").iterdir()))
        await client.delete_tenant("tenants/acme", force=True)
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
    assert refused.value.code() is grpc.StatusCode.ABORTED
    assert "was deleted during this upload" in (refused.value.details() or "")
    with pytest.raises(NotFoundError):
        await client.get_tenant("tenants/acme")
    assert list((served.store.root / "objects").glob("*/*")) == []
    # What begins afterwards is another tenant of the same name, and its numbers go on.
    assert (await client.upload_adapter(NAME, loras[1])).version == 2


async def test_watchers_of_a_deleted_tenant_hear_of_every_adapter(client: AsyncClient, loras: list[Path]) -> None:
    names = [f"tenants/acme/adapters/a{number}" for number in range(3)]
    for name in names:
        await client.upload_adapter(name, loras[0])
    seen: dict[str, list[tuple[str, str]]] = {"tenants/acme": [], names[1]: []}

    async def watch(parent: str, until: int) -> None:
        async for event in client.watch_adapters(parent):
            seen[parent].append((event.type, event.adapter.name))
            if len(seen[parent]) == until:
                return

    watching = [asyncio.create_task(watch("tenants/acme", 6)), asyncio.create_task(watch(names[1], 2))]
    await until(lambda: len(seen["tenants/acme"]) == 3 and seen[names[1]])  # the watches have begun
    await client.delete_tenant("tenants/acme", force=True)
    await asyncio.wait_for(asyncio.gather(*watching), 10)
    assert seen["tenants/acme"][3:] == [("DELETED", name) for name in names]
    assert seen[names[1]] == [("STATE", names[1]), ("DELETED", names[1])]


@pytest.mark.parametrize("revoked", ["the tenant is deleted", "its key is deleted"])
async def test_a_watch_ends_with_its_key_and_sees_nothing_of_a_later_tenant_of_that_name(
    revoked: str, serve: Servers, loras: list[Path]
) -> None:
    seen: list[str] = []

    async def watch(client: AsyncClient) -> None:
        events = client.watch_adapters("tenants/acme")
        async for kind in (event.type async for event in events):
            seen.append(kind)  # noqa: PERF401 - as they come

    async with serve(auth="keys") as served, served.client(api_key=served.admin_key) as admin:
        await admin.create_tenant("acme")
        key, other = [await admin.create_api_key("tenants/acme") for _ in range(2)]
        await admin.upload_adapter(NAME, loras[0])
        async with served.client(api_key=key.secret) as holder, served.client(api_key=other.secret) as neighbour:
            watching, watching_on = asyncio.create_task(watch(holder)), asyncio.create_task(watch(neighbour))
            await until(lambda: seen == ["STATE", "STATE"])
            if revoked == "its key is deleted":
                await admin.delete_api_key(key.name)
                with pytest.raises(UnauthenticatedError):
                    await asyncio.wait_for(watching, 10)
                await admin.upload_adapter(NAME, loras[1])
                await until(lambda: seen == ["STATE", "STATE", "VERSION_CREATED"])
                watching_on.cancel()
            else:
                await admin.delete_tenant("tenants/acme", force=True)
                await admin.create_tenant("acme")
                await admin.upload_adapter(NAME, loras[1])
                for each in (watching, watching_on):
                    with pytest.raises(UnauthenticatedError):
                        await asyncio.wait_for(each, 10)
                assert seen == ["STATE", "STATE", "DELETED", "DELETED"]


async def test_a_tenant_with_adapters_goes_only_by_force(client: AsyncClient, loras: list[Path]) -> None:
    await client.upload_adapter(NAME, loras[0])
    with pytest.raises(FailedPreconditionError, match="force"):
        await client.delete_tenant("tenants/acme")
    assert (await client.get_adapter(NAME)).serving_version == 1
    await client.delete_adapter(NAME)
    await client.delete_tenant("tenants/acme")
    with pytest.raises(NotFoundError):
        await client.get_tenant("tenants/acme")
