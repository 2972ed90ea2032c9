"""A full disk under a server: uploads are refused by a reason of their own, everything else goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltamux.errors import NotFoundError, ResourceExhaustedError
from deltamux_testing.disks import fill, small_disk
from deltamux_testing.servers import Servers

NAME = "tenants/acme/adapters/tickets"
GREEDY: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True}


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
                assert len((await client.generate("hello", adapter=NAME, **GREEDY)).token_ids) == 3
                assert list((disk / "store" / "staging").iterdir()) == []
                filler.unlink()
            fill(disk)
            assert [a.name for a in await client.list_adapters("tenants/acme")] == [NAME]
            await client.delete_adapter(NAME)
            with pytest.raises(NotFoundError):
                await client.get_adapter(NAME)
            (disk / "filler").unlink()
            assert (await client.upload_adapter(NAME, loras[1])).version == 2
