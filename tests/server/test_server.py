"""The server's behaviour around the engine: errors, aborts, tenants, versions, health, watching."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from deltamux.client import AsyncClient, Client
from deltamux.deltas import BaseSupport
from deltamux.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidAdapterError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from deltamux.server.rpc.messages import base_message
from deltamux_testing.certificates import write_certificate
from deltamux_testing.servers import Served, Servers
from deltamux_testing.waiting import until

NAME = "tenants/acme/adapters/tickets"
GREEDY: dict[str, Any] = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
LONG: dict[str, Any] = {**GREEDY, "max_tokens": 300}


async def settled(served: Served) -> list[str]:
    """Waits until nothing runs in the engine; returns the aborted requests."""
    await until(lambda: not served.engine.running)
    return served.engine.aborted


async def test_a_generation_reports_what_was_used(client: AsyncClient, loras: list[Path]) -> None:
    version = await client.upload_adapter(NAME, loras[0], labels={"run": "7"})
    assert (version.name, version.method, version.rank, version.state) == (f"{NAME}/versions/1", "lora", 4, "READY")
    assert version.labels == {"run": "7"}
    whole = await client.generate("hello", adapter=NAME, logprobs=2, **GREEDY)
    assert (len(whole.token_ids), len(whole.logprobs), len(whole.top_logprobs[0])) == (5, 5, 2)
    assert whole.usage.prompt_tokens == 5
    assert (whole.finish_reason, whole.adapter_version) == ("length", version.name)
    chunks = [c async for c in client.generate_stream("hello", adapter=NAME, **GREEDY)]
    assert tuple(t for c in chunks for t in c.token_ids) == whole.token_ids
    assert "".join(c.text for c in chunks) == whole.text


async def test_the_base_and_what_it_takes_are_returned(client: AsyncClient, served: Served) -> None:
    base, engine = await client.get_base(), served.engine
    assert (base.architecture, base.fingerprint) == (engine.base.architecture, engine.base.fingerprint)
    assert (base.dtype, base.max_model_len) == ("float32", engine.max_model_len)
    assert {site.kind: site.num_supported for site in base.sites} == Counter(str(kind) for kind, _ in engine.base.sites)
    refused = {("norm", f"layers.{index}.norm"): "vLLM's holds another weight" for index in range(101)}
    (norms,) = base_message(engine.base, 256, BaseSupport(frozenset(), refused), {}).sites
    assert (norms.kind, norms.num_supported, norms.num_refused, len(norms.refused)) == ("norm", 0, 101, 100)
    assert (norms.refused[7].name, norms.refused[7].reason) == ("layers.7.norm", "vLLM's holds another weight")


async def test_a_composition_is_an_adapter_of_its_own(client: AsyncClient, loras: list[Path]) -> None:
    first, second = "tenants/acme/adapters/domain", "tenants/acme/adapters/customer"
    await client.upload_adapter(first, loras[0])
    await client.upload_adapter(second, loras[1])
    stacked = await client.compose_adapter(NAME, [first, f"{second}/versions/1"])
    assert (stacked.method, stacked.rank) == ("composition", 4)
    answer = (await client.generate("hello", adapter=NAME, **GREEDY)).token_ids
    alone = {name: (await client.generate("hello", adapter=name, **GREEDY)).token_ids for name in (first, second)}
    assert answer not in alone.values()
    summed = await client.compose_adapter(NAME, {first: 0.5, second: 2.0}, mode="sum", promote=False)
    assert (summed.version, summed.rank) == (2, 8)
    await client.delete_adapter(first)
    await client.delete_adapter(second)
    assert (await client.generate("hello", adapter=NAME, **GREEDY)).token_ids == answer


async def test_a_composition_that_cannot_be_is_refused_with_its_part(client: AsyncClient, loras: list[Path]) -> None:
    one = "tenants/acme/adapters/one"
    await client.upload_adapter(one, loras[0])
    with pytest.raises(NotFoundError, match="other"):
        await client.compose_adapter(NAME, [one, "tenants/acme/adapters/other"])
    with pytest.raises(InvalidArgumentError, match="2 to 16"):
        await client.compose_adapter(NAME, [one])
    with pytest.raises(InvalidArgumentError, match="weights are for a sum"):
        await client.compose_adapter(NAME, {one: 0.5, f"{one}/versions/1": 1.0})
    assert [adapter.name for adapter in await client.list_adapters("tenants/acme")] == [one]


async def test_closing_a_stream_aborts_the_generation(client: AsyncClient, served: Served) -> None:
    async with aclosing(client.generate_stream("hello", **LONG)) as stream:  # type: ignore[type-var]  # a generator
        async for _ in stream:
            break
    assert len(await settled(served)) == 1


async def test_a_deadline_aborts_the_generation(client: AsyncClient, served: Served) -> None:
    with pytest.raises(DeadlineExceededError):
        await client.generate("hello", timeout=0.3, **LONG)
    assert len(await settled(served)) == 1


@pytest.mark.parametrize(
    ("call", "kind", "reason"),
    [
        (lambda c: c.generate("x", adapter="tenants/acme/adapters/none"), NotFoundError, "NOT_FOUND"),
        (lambda c: c.generate("x", adapter="acme/none"), InvalidArgumentError, "INVALID_NAME"),
        (lambda c: c.generate("x", temperature=-1.0), InvalidArgumentError, "INVALID_SAMPLING"),
        (lambda c: c.generate([]), InvalidArgumentError, "EMPTY_PROMPT"),
        (lambda c: c.get_adapter("tenants/acme/adapters/none"), NotFoundError, "NOT_FOUND"),
        (lambda c: c.promote(NAME, version=9), NotFoundError, "NOT_FOUND"),
        (lambda c: c.rollback(NAME), FailedPreconditionError, "NO_PREVIOUS_VERSION"),
        (lambda c: c.delete_adapter(f"{NAME}/versions/1"), FailedPreconditionError, "VERSION_SERVES"),
        (lambda c: c.get_tenant("tenants/none"), NotFoundError, "NOT_FOUND"),
        (lambda c: c.delete_tenant("tenants/acme"), FailedPreconditionError, "TENANT_NOT_EMPTY"),
    ],
)
async def test_an_error_keeps_its_class_and_reason_over_the_wire(
    call: Any, kind: type[Exception], reason: str, client: AsyncClient, loras: list[Path]
) -> None:
    await client.upload_adapter(NAME, loras[0])
    with pytest.raises(kind) as raised:
        await call(client)
    assert raised.value.reason == reason  # type: ignore[attr-defined]  # of our family


async def test_an_error_in_a_stream_keeps_its_status(client: AsyncClient) -> None:
    with pytest.raises(NotFoundError):
        [c async for c in client.generate_stream("x", adapter=NAME)]


async def test_a_directory_without_tensors_is_refused_before_anything_is_sent(
    client: AsyncClient, tmp_path: Path
) -> None:
    with pytest.raises(InvalidAdapterError, match="adapter_config"):
        await client.upload_adapter(NAME, tmp_path)


async def test_a_running_stream_keeps_its_version_through_promotion_and_deletion(
    client: AsyncClient, loras: list[Path]
) -> None:
    await client.upload_adapter(NAME, loras[0])
    long = {**GREEDY, "max_tokens": 40}
    expected = await client.generate("hello", adapter=NAME, **long)
    running_one = asyncio.create_task(client.generate("hello", adapter=NAME, **long))
    await asyncio.sleep(0.1)
    second = await client.upload_adapter(NAME, loras[1], promote=True)
    after = await client.generate("hello", adapter=NAME, max_tokens=4, temperature=0.0)
    assert after.adapter_version == second.name
    await client.delete_adapter(NAME)
    with pytest.raises(NotFoundError):
        await client.get_adapter(NAME)
    assert (await running_one).token_ids == expected.token_ids


async def test_watching_reports_the_present_and_every_change(client: AsyncClient, loras: list[Path]) -> None:
    await client.upload_adapter(NAME, loras[0])
    events: list[tuple[str, int | None]] = []

    async def watch() -> None:
        async for event in client.watch_adapters("tenants/acme"):
            events.append((event.type, event.version))
            if event.type == "DELETED":
                return

    watching = asyncio.create_task(watch())
    await until(lambda: events)  # the first is the sign that the watch has begun
    await client.upload_adapter(NAME, loras[1])
    await client.promote(NAME, version=2)
    await client.delete_adapter(f"{NAME}/versions/1")
    await client.delete_adapter(NAME)
    await asyncio.wait_for(watching, 10)
    assert events == [
        ("STATE", None),
        ("VERSION_CREATED", 2),
        ("UPDATED", None),
        ("VERSION_DELETED", 1),
        ("DELETED", None),
    ]


async def test_a_tenant_gets_its_own_and_nothing_else(serve: Servers, loras: list[Path]) -> None:
    async with serve(auth="keys") as server:
        async with server.client(api_key=server.admin_key) as admin:
            for tenant in ("acme", "globex"):
                await admin.create_tenant(tenant)
            key = await admin.create_api_key("tenants/acme")
            await admin.upload_adapter("tenants/globex/adapters/secret", loras[0])
        async with server.client(api_key=key.secret) as acme:
            await acme.upload_adapter(NAME, loras[1])
            assert (await acme.generate("x", adapter=NAME, max_tokens=1)).adapter_version == f"{NAME}/versions/1"
            for name in ("tenants/globex/adapters/secret", "tenants/globex/adapters/absent"):
                with pytest.raises(NotFoundError, match="or belongs to another tenant"):
                    await acme.generate("x", adapter=name, max_tokens=1)
            with pytest.raises(NotFoundError):
                await acme.upload_adapter("tenants/globex/adapters/mine", loras[0])
            with pytest.raises(PermissionDeniedError):
                await acme.list_tenants()
        for wrong in (None, "dmx_wrong"):
            async with server.client(api_key=wrong) as stranger:
                with pytest.raises(UnauthenticatedError):
                    await stranger.generate("x")


async def test_with_keys_and_tls_it_listens_on_all_addresses(serve: Servers, tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path)
    async with serve(listen="0.0.0.0:0", auth="keys", tls_cert=cert, tls_key=key) as server:
        address = f"localhost:{server.address.rpartition(':')[2]}"
        async with AsyncClient(address, api_key=server.admin_key, tls=cert.read_bytes()) as client:
            assert len((await client.generate("x", max_tokens=3, ignore_eos=True)).token_ids) == 3


@pytest.mark.parametrize("given", [{}, {"auth": "keys"}])
async def test_listening_beyond_loopback_needs_keys_and_tls(given: dict[str, Any], serve: Servers) -> None:
    with pytest.raises(FailedPreconditionError, match="--insecure"):
        async with serve(listen="0.0.0.0:0", **given):
            pass


async def test_the_client_for_threads_does_the_same(served: Served, loras: list[Path]) -> None:
    def use() -> None:
        with Client(served.address, timeout=60) as client:
            version = client.upload_adapter(NAME, loras[0])
            whole = client.generate("hello", adapter=NAME, **GREEDY)
            chunks = list(client.generate_stream("hello", adapter=NAME, **GREEDY))
            assert tuple(t for c in chunks for t in c.token_ids) == whole.token_ids
            assert client.get_adapter(NAME).serving_version == version.version
            with pytest.raises(NotFoundError) as raised:
                client.generate("x", adapter="tenants/acme/adapters/none")
            assert raised.value.code is grpc.StatusCode.NOT_FOUND
            assert raised.value.metadata == {"name": "tenants/acme/adapters/none"}

    await asyncio.to_thread(use)
