"""Uploads over a real socket: bombs, files that do not fit their config, and a disk that is full."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.client import AsyncClient
from deltamux.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from deltamux.server.compiling.memory import is_out_of_memory
from deltamux_testing.disks import fill, small_disk
from deltamux_testing.servers import Served, Servers

NAME = "tenants/acme/adapters/tickets"

BOMBS = {
    "a shape with text": '{"t":{"dtype":"F32","shape":["a",500000000],"data_offsets":[0,4]}}',
    "a shape with a list": '{"t":{"dtype":"F32","shape":[[0],300000000],"data_offsets":[0,4]}}',
    "500 dimensions of 4,000 digits": '{"t":{"dtype":"F32","shape":[' + ",".join(["9" * 4000] * 500),
    "10,000 deep": '{"t":' + "[" * 10_000,
}


@pytest.fixture
def adapter(loras: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(loras[0], tmp_path / "adapter"))


@pytest.mark.parametrize("case", BOMBS)
async def test_a_bomb_in_a_header_costs_the_server_neither_memory_nor_time(
    case: str, client: AsyncClient, served: Served, adapter: Path
) -> None:
    header = BOMBS[case].encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(InvalidArgumentError, match="'t'") as refused:
        await client.upload_adapter(NAME, adapter, timeout=60)
    assert refused.value.reason == "DAMAGED_FILE"
    assert refused.value.metadata == {"file": "adapter_model.safetensors", "tensor": "t"}
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("shape", [(4, 96), (4,), (0, 64)])
async def test_a_tensor_of_another_shape_is_refused_as_another_bases(
    shape: tuple[int, ...], client: AsyncClient, adapter: Path
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[min(tensors)] = torch.zeros(shape)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises((BaseMismatchError, InvalidArgumentError)) as refused:
        await client.upload_adapter(NAME, adapter, timeout=30)
    assert "lora" in refused.value.message or "low_rank" in refused.value.message


async def test_a_config_with_a_key_twice_is_refused_with_the_key(client: AsyncClient, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config)[:-1] + ', "r": 8}')
    with pytest.raises(InvalidAdapterError, match="'r' occurs twice") as refused:
        await client.upload_adapter(NAME, adapter, timeout=60)
    assert refused.value.metadata == {"file": "adapter_config.json", "field": "r"}


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another rank": ({"r": 1_000_000_000}, "RANK_MISMATCH"),
    "half a regular expression": ({"target_modules": "("}, "INVALID_CONFIG"),
    "one that matches nothing": ({"target_modules": r"(.*)*(.*)*(.*)*x"}, "INVALID_CONFIG"),
    "a layer that is not there": ({"layers_to_transform": -3}, "INVALID_CONFIG"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
async def test_a_config_that_does_not_fit_its_file_is_refused_at_once_and_costs_no_compiler(
    case: str, client: AsyncClient, adapter: Path
) -> None:
    changed, reason = REFUSED_CONFIGS[case]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changed))
    compilers = _compilers()
    with pytest.raises(InvalidArgumentError) as refused:
        await client.upload_adapter(NAME, adapter, timeout=60)
    assert refused.value.reason == reason
    assert _compilers() == compilers


def _compilers() -> set[int]:
    return {child.pid for child in psutil.Process().children() if "deltamux.server.compiling.child" in child.cmdline()}


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_ring_of_errors_is_walked_once_to_find_a_shortage_of_memory(length: int, link: str) -> None:
    errors: list[BaseException] = [ValueError(str(number)) for number in range(length)]
    for number, error in enumerate(errors):
        setattr(error, link, errors[(number + 1) % length])
    assert not is_out_of_memory(errors[0])
    errors[-1].__cause__ = MemoryError()
    assert is_out_of_memory(errors[0])


async def test_a_full_disk_refuses_uploads_and_nothing_else(tmp_path: Path, serve: Servers, loras: list[Path]) -> None:
    size = sum((loras[1] / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))
    with small_disk(tmp_path / "disk") as disk:
        async with serve(store=disk / "store") as server, server.client() as client:
            await client.upload_adapter(NAME, loras[0])
            # No room for the files; then room for these, but not for the program that is made of them.
            for leave in (0, size // 4096 * 4096 + 3 * 4096):
                filler = fill(disk, leave=leave)
                with pytest.raises(ResourceExhaustedError, match="is full: free space") as full:
                    await client.upload_adapter(NAME, loras[1])
                assert full.value.reason == "STORE_FULL"
                done = await client.generate("hello", adapter=NAME, max_tokens=3, ignore_eos=True)
                assert len(done.token_ids) == 3
                assert list((disk / "store" / "staging").iterdir()) == []
                filler.unlink()
            fill(disk)
            assert [a.name for a in await client.list_adapters("tenants/acme")] == [NAME]
            await client.delete_adapter(NAME)
            with pytest.raises(NotFoundError):
                await client.get_adapter(NAME)
            (disk / "filler").unlink()
            assert (await client.upload_adapter(NAME, loras[1])).version == 2
