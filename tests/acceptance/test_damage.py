"""A stored program that is damaged under a server: found by the worker, named, repaired by another tenant's upload."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltamux.cli import main
from deltamux.client import Client
from deltamux.deltas import BaseModel
from deltamux.errors import DataLossError
from deltamux_testing.adapters import write_own
from deltamux_testing.disks import flip
from deltamux_testing.server_process import ServerProcess

NAME = "tenants/acme/adapters/harmed"


def answer(client: Client, name: str) -> tuple[int, ...]:
    return client.generate([5, 6], adapter=name, max_tokens=8, temperature=0).token_ids


def test_one_flipped_bit_of_a_stored_program_is_found_and_repaired_while_others_are_served(
    server: ServerProcess,
    client: Client,
    base_directory: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Of a content that no other test has brought into the engine's memory, and not serving: it is on the disk alone.
    fresh = write_own("lora", BaseModel.from_pretrained(base_directory), tmp_path / "fresh", seed=77, r=4)
    whole = client.upload_adapter(NAME, adapters["lora-1"])
    harmed = client.upload_adapter(NAME, fresh)
    program = server.store / "objects" / harmed.digest[:2] / harmed.digest / "program.safetensors"
    flip(program)
    assert main(["store", "check", str(server.store)]) == 1
    assert harmed.name in capsys.readouterr().out
    with pytest.raises(DataLossError, match="Upload the same files again") as lost:
        answer(client, harmed.name)
    assert (lost.value.reason, lost.value.metadata["name"]) == ("PROGRAM_DAMAGED", harmed.name)
    assert client.get_adapter_version(harmed.name).state == "DAMAGED"
    assert len(answer(client, whole.name)) == 8
    same = client.upload_adapter("tenants/globex/adapters/same", fresh, promote=True)
    assert client.get_adapter_version(harmed.name).state == "READY"
    assert answer(client, harmed.name) == answer(client, same.name)
    assert main(["store", "check", str(server.store)]) == 0
    client.delete_tenant("tenants/globex", force=True)
    client.delete_adapter(NAME)
