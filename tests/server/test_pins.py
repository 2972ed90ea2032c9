"""Pins: counted by adapter, bounded per tenant and in all; one that cannot be restored affects no other."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from deltamux.errors import ResourceExhaustedError, UnavailableError
from deltamux_testing.servers import Servers
from deltamux_testing.waiting import until

ONE, TWO, THREE = (f"tenants/acme/adapters/{name}" for name in ("one", "two", "three"))
OTHERS = "tenants/globex/adapters/one"


async def test_a_pin_belongs_to_one_adapter_and_follows_what_it_serves(serve: Servers, loras: list[Path]) -> None:
    async with serve() as server, server.client() as client:
        engine = server.engine
        shared = (await client.upload_adapter(ONE, loras[0])).digest
        assert (await client.upload_adapter(OTHERS, loras[0])).digest == shared
        assert (await client.pin_adapter(ONE)).pinned
        await client.pin_adapter(OTHERS)
        await client.unpin_adapter(OTHERS)
        assert engine.pinned == {shared}, "another tenant's adapter of equal content must not take the pin along"
        other = (await client.upload_adapter(ONE, loras[1], promote=True)).digest
        assert engine.pinned == {other}
        await client.rollback(ONE)
        assert engine.pinned == {shared}
        await client.delete_adapter(ONE)
        assert engine.pinned == set()


async def test_pins_are_bounded_per_tenant_and_in_all(serve: Servers, loras: list[Path]) -> None:
    third = "tenants/initech/adapters/one"
    limited = serve(max_pinned_adapters_per_tenant=2, max_host_adapters=6)
    async with limited as server, server.client() as client:
        for name in (ONE, TWO, THREE, OTHERS, third):
            await client.upload_adapter(name, loras[0])
        for name in (ONE, TWO, TWO):
            await client.pin_adapter(name)
        with pytest.raises(ResourceExhaustedError, match="tenants/acme has pinned 2") as refused:
            await client.pin_adapter(THREE)
        assert refused.value.reason == "PIN_BUDGET"
        await client.pin_adapter(OTHERS)
        with pytest.raises(ResourceExhaustedError, match="all tenants together have pinned 3"):
            await client.pin_adapter(third)
        await client.unpin_adapter(TWO)
        await client.pin_adapter(third)


async def test_a_pin_that_cannot_be_restored_is_reported_and_the_others_are(serve: Servers, loras: list[Path]) -> None:
    async with serve() as server, server.client() as client:
        damaged = await client.upload_adapter(ONE, loras[0])
        whole = await client.upload_adapter(TWO, loras[1])
        for name in (ONE, TWO):
            await client.pin_adapter(name)
    shutil.rmtree(serve.store / "objects" / damaged.digest[:2] / damaged.digest)
    async with serve() as server, server.client() as client:
        engine = server.engine
        async with asyncio.timeout(30):
            while not (await client.get_adapter(ONE)).problem or not engine.pinned:  # noqa: ASYNC110 - as an operator
                await asyncio.sleep(0.02)
        assert engine.pinned == {whole.digest}
        assert (await client.get_adapter(ONE)).pinned, "what is wrong must not be forgotten with the restart"
        assert (await client.get_adapter(TWO)).problem == ""
        assert "not in the engine's memory" in (await client.list_adapters("tenants/acme"))[0].problem
        # The same files, of whichever tenant, repair it, and its pin is kept again.
        await client.upload_adapter("tenants/globex/adapters/same", loras[0])
        assert (await client.get_adapter(ONE)).problem == ""
        assert engine.pinned == {whole.digest, damaged.digest}


async def test_a_pinned_program_that_was_repaired_is_pinned_again_in_the_next_engine(
    serve: Servers, loras: list[Path]
) -> None:
    async with serve(engine_restart_seconds=0.01) as server, server.client() as client:
        engine = server.engine
        version = await client.upload_adapter(ONE, loras[0])
        await client.pin_adapter(ONE)
        (serve.store / "objects" / version.digest[:2] / version.digest / "program.safetensors").unlink()
        await client.upload_adapter(OTHERS, loras[0])
        engine.host.clear()
        engine.pinned.clear()
        engine.crash()
        await until(lambda: engine.pinned == {version.digest})
        assert (await client.get_adapter(ONE)).problem == ""


async def test_an_upload_while_the_engine_is_down_changes_nothing_and_has_a_retry_time(
    serve: Servers, loras: list[Path]
) -> None:
    async with serve(engine_restart_seconds=30.0) as server, server.client() as client:
        await client.upload_adapter(ONE, loras[0])
        server.engine.crash()
        with pytest.raises(UnavailableError) as refused:
            await client.upload_adapter(ONE, loras[1], promote=True)
        assert refused.value.retry_after is not None
        assert (await client.get_adapter(ONE)).serving_version == 1
        assert len(await client.list_adapter_versions(ONE)) == 1
