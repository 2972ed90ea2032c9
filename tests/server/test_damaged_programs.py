"""Stored programs that are damaged, or of another base: named, marked, repaired; all others are served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltamux.cli import main
from deltamux.client import AsyncClient
from deltamux.deltas import BaseModel
from deltamux.errors import DataLossError, FailedPreconditionError
from deltamux.server.compiling.job import Job
from deltamux.store import AdapterKey, VersionKey
from deltamux_testing.adapters import write_own
from deltamux_testing.disks import flip
from deltamux_testing.servers import Served, Servers
from deltamux_testing.tiny_base import write_base
from deltamux_testing.uploads import execute

NAME = "tenants/acme/adapters/tickets"
OTHER = "tenants/globex/adapters/mails"
GREEDY: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def soft_prompt(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of two virtual tokens."""
    base = BaseModel.from_pretrained(tiny_base)
    return write_own("prompt", base, tmp_path_factory.mktemp("prompt") / "adapter", num_virtual_tokens=2)


async def tokens(client: AsyncClient, name: str | None) -> tuple[int, ...]:
    return (await client.generate("hello", adapter=name, **GREEDY)).token_ids


async def harmed(served: Served, harm: Callable[[Path], object]) -> Path:
    """Damages the program of the first adapter's first version, and evicts it from the engine."""
    record = served.store.versions(AdapterKey("acme", "tickets"))[0]
    harm(record.program)
    await served.engine.evict(record.compiled.digest)
    return record.program


@pytest.mark.parametrize("harm", [flip, Path.unlink])
async def test_a_damaged_program_is_named_and_repaired_by_the_same_files_of_any_tenant(
    harm: Callable[[Path], object], served: Served, client: AsyncClient, loras: list[Path]
) -> None:
    version = await client.upload_adapter(NAME, loras[0])
    second = await client.upload_adapter(NAME, loras[1])
    expected = await tokens(client, NAME)
    await harmed(served, harm)
    for call in (tokens(client, NAME), client.promote(NAME, version=1)):
        with pytest.raises(DataLossError, match="Upload the same files again") as lost:
            await call
        assert lost.value.reason == "PROGRAM_DAMAGED"
        assert lost.value.metadata["name"] == version.name
    assert (await client.get_adapter_version(version.name)).state == "DAMAGED"
    assert (await client.get_adapter_version(second.name)).state == "READY"
    assert await tokens(client, second.name) != expected
    assert len(await tokens(client, None)) == 4
    assert (await client.upload_adapter(OTHER, loras[0])).version == 1
    assert (await client.get_adapter_version(version.name)).state == "READY"
    assert await tokens(client, NAME) == await tokens(client, OTHER) == expected


async def test_a_program_that_is_whole_again_needs_no_upload(
    served: Served, client: AsyncClient, loras: list[Path]
) -> None:
    version = await client.upload_adapter(NAME, loras[0])
    expected = await tokens(client, NAME)
    whole = served.store.version(VersionKey("acme", "tickets", 1)).program.read_bytes()
    path = await harmed(served, Path.unlink)
    with pytest.raises(DataLossError):
        await tokens(client, NAME)
    path.write_bytes(whole)
    assert await tokens(client, NAME) == expected
    assert (await client.get_adapter_version(version.name)).state == "READY"


@pytest.mark.parametrize("number", [3, -1, "'x'"])
async def test_a_row_with_other_virtual_tokens_than_its_program_is_refused_until_it_is_repaired(
    number: object, served: Served, client: AsyncClient, soft_prompt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = await client.upload_adapter(NAME, soft_prompt)
    execute(served.store.root, f"UPDATE versions SET num_virtual_tokens = {number} WHERE tenant = 'acme'")
    assert await asyncio.to_thread(main, ["store", "check", str(served.store.root)]) == 1
    assert f"ROW_DAMAGED: {version.name}" in capsys.readouterr().out
    with pytest.raises(DataLossError, match="virtual tokens") as lost:
        await tokens(client, NAME)
    assert (lost.value.reason, lost.value.metadata["name"]) == ("ROW_DAMAGED", version.name)
    assert (await client.upload_adapter(OTHER, soft_prompt)).version == 1
    assert await tokens(client, NAME) == await tokens(client, OTHER)


async def test_rows_that_cannot_be_read_leave_their_adapter_and_its_lists_usable(
    served: Served, client: AsyncClient, loras: list[Path]
) -> None:
    await client.upload_adapter(NAME, loras[0])
    expected = await tokens(client, NAME)
    for statement in (
        "UPDATE versions SET labels = '{', created = 1e300, rank = 9223372036854775807, num_bytes = -1, method = x'ff'",
        "UPDATE adapters SET created = 'x', canary_number = 7, canary_percent = 500, pinned = 'x'",
        "INSERT INTO tenants VALUES (CAST(x'ff' AS TEXT), 0)",
    ):
        execute(served.store.root, statement)
    assert [version.version for version in await client.list_adapter_versions(NAME)] == [1]
    assert [adapter.serving_version for adapter in await client.list_adapters("tenants/acme")] == [1]
    assert [tenant.name for tenant in await client.list_tenants()] == ["tenants/acme"]
    assert await tokens(client, NAME) == await tokens(client, f"{NAME}/versions/1") == expected
    await client.delete_adapter(NAME)
    assert (await client.upload_adapter(NAME, loras[0])).version == 2


async def test_a_composition_of_a_damaged_upload_is_refused(
    served: Served, client: AsyncClient, loras: list[Path]
) -> None:
    await client.upload_adapter(NAME, loras[0])
    await client.upload_adapter(OTHER, loras[1])
    record = served.store.versions(AdapterKey("acme", "tickets"))[0]
    flip(record.program.parent / "adapter_model.safetensors")
    with pytest.raises(DataLossError) as lost:
        await client.compose_adapter("tenants/acme/adapters/both", [NAME, OTHER])
    assert lost.value.reason == "UPLOAD_DAMAGED"


async def on(serve: Servers, base: Path, work: Callable[[AsyncClient], Any], **given: Any) -> Any:
    """Returns what a client gets from a server of that base on the common store."""
    async with serve(base=base, **given) as server, server.client() as client:
        return await work(client)


async def uploaded(client: AsyncClient, loras: list[Path]) -> tuple[int, ...]:
    await client.upload_adapter(NAME, loras[0])
    await client.upload_adapter(OTHER, loras[1])
    return await tokens(client, OTHER)


async def recompiled(client: AsyncClient) -> tuple[int, ...]:
    assert (await client.generate("hello", adapter=OTHER, **GREEDY)).adapter_version == f"{OTHER}/versions/1"
    return await tokens(client, OTHER)


@pytest.mark.slow
async def test_programs_of_another_base_of_equal_shapes_are_refused_or_recompiled(
    tiny_base: Path, tmp_path: Path, serve: Servers, loras: list[Path]
) -> None:
    async def refused(client: AsyncClient) -> tuple[int, ...]:
        with pytest.raises(FailedPreconditionError, match="--recompile") as changed:
            await tokens(client, NAME)
        assert changed.value.reason == "BASE_CHANGED"
        assert len({changed.value.metadata["compiled_for"], changed.value.metadata["base"]}) == 2
        # What is uploaded here is compiled for this base, for all versions of the same files.
        await client.upload_adapter("tenants/acme/adapters/fresh", loras[0])
        return await tokens(client, NAME)

    similar = write_base(tmp_path / "similar", seed=1)
    first = await on(serve, tiny_base, lambda client: uploaded(client, loras))
    assert await on(serve, similar, refused) != first
    assert await on(serve, similar, recompiled, recompile=True) != first
    assert await on(serve, tiny_base, recompiled, recompile=True) == first


@pytest.mark.slow
async def test_programs_damaged_before_the_start_are_recompiled_or_repaired(
    tiny_base: Path, serve: Servers, loras: list[Path]
) -> None:
    async def damaged(client: AsyncClient) -> None:
        with pytest.raises(DataLossError):
            await tokens(client, OTHER)

    first = await on(serve, tiny_base, lambda client: uploaded(client, loras))
    programs = list((serve.store / "objects").glob("*/*/program.safetensors"))
    for program in programs:
        flip(program)
    await on(serve, tiny_base, damaged)
    assert await on(serve, tiny_base, recompiled, recompile=True) == first
    for program in programs:
        program.unlink(missing_ok=True)
    check = ["store", "check", str(serve.store)]
    await asyncio.to_thread(main, [*check, "--repair", "--model", str(tiny_base)])
    assert await asyncio.to_thread(main, check) == 0
    assert await on(serve, tiny_base, recompiled) == first


async def test_what_cannot_be_compiled_for_another_base_is_named_and_tried_once_and_others_are_served(
    tiny_base: Path, tmp_path: Path, serve: Servers, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    similar = write_base(tmp_path / "similar", seed=1)
    # An adapter of our own says which base it was trained on; one of PEFT's does not.
    own = write_own("ia3", BaseModel.from_pretrained(tiny_base), tmp_path / "own")
    async with serve() as server, server.client() as client:
        await client.upload_adapter(NAME, own)
        await client.upload_adapter(OTHER, loras[0])
    compiled: list[str] = []
    compiling = serve.compiler.compile

    async def counted(job: Job, tenant: str) -> Any:
        compiled.append(tenant)
        return await compiling(job, tenant)

    monkeypatch.setattr(serve.compiler, "compile", counted)
    async with serve(base=similar, recompile=True) as server, server.client() as client:
        for _ in range(3):
            with pytest.raises(FailedPreconditionError, match="cannot be compiled for this server's base") as refused:
                await tokens(client, NAME)
            assert (refused.value.reason, refused.value.metadata["name"]) == ("BASE_MISMATCH", f"{NAME}/versions/1")
        assert len(await tokens(client, OTHER)) == 4
    assert compiled == ["acme", "globex"]
