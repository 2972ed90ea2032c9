"""Every way an adapter can be bad: refused at upload, with the reason, while other streams run on."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.client import Client
from deltamux.client.channel import error_of
from deltamux.deltas import BaseModel
from deltamux.errors import DeltamuxError
from deltamux.v1 import adapters_pb2 as pb
from deltamux.v1.adapters_pb2_grpc import AdaptersStub
from deltamux_testing.adapters import write_own
from deltamux_testing.server_process import ServerProcess, streaming

pytestmark = pytest.mark.usefixtures("_traffic")

NAME = "tenants/mallory/adapters/bad"
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


Change = Callable[[Path], object]


def tensors(change: Callable[[dict[str, Any], str], object]) -> Change:
    """Returns what changes an adapter's tensors, given with the name of the first."""

    def spoil(directory: Path) -> None:
        found = load_file(directory / TENSORS)
        change(found, min(found))
        save_file(found, directory / TENSORS)

    return spoil


def config(**values: Any) -> Change:
    def spoil(directory: Path) -> None:
        (directory / CONFIG).write_text(json.dumps({**json.loads((directory / CONFIG).read_text()), **values}))

    return spoil


def content(data: bytes) -> Change:
    """Returns what puts other bytes in the place of the tensors."""
    return lambda directory: (directory / TENSORS).write_bytes(data)


def truncated(directory: Path) -> None:
    data = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes(data[: len(data) // 2])


CLAIM = json.dumps({"x": {"dtype": "F32", "shape": [50_000, 50_000], "data_offsets": [0, 10_000_000_000]}}).encode()
STRAY = "base_model.model.lm_head.lora_A.weight"
INVALID = "INVALID_ARGUMENT"
BAD: dict[str, tuple[Change, str, str]] = {
    "tensors of another base": (
        tensors(lambda t, first: t.update({first: torch.zeros(4, 96)})),
        "FAILED_PRECONDITION",
        "BASE_MISMATCH",
    ),
    "a missing tensor": (tensors(lambda t, first: t.pop(first)), INVALID, "MISSING_TENSOR"),
    "an unknown tensor": (tensors(lambda t, _: t.update({STRAY: torch.zeros(4, 64)})), INVALID, "UNCLAIMED_TENSOR"),
    "a NaN": (tensors(lambda t, first: t[first].view(-1)[7:8].fill_(float("nan"))), INVALID, "NOT_FINITE"),
    "int8 factors": (
        tensors(lambda t, first: t.update({first: t[first].to(torch.int8)})),
        INVALID,
        "INVALID_ADAPTER",
    ),
    "a truncated file": (truncated, INVALID, "TRUNCATED_FILE"),
    "a pickle in disguise": (content(pickle.dumps({"weights": [1.0] * 100})), INVALID, "PICKLE"),
    "a claim of ten gigabytes": (
        content(struct.pack("<Q", len(CLAIM)) + CLAIM + bytes(64)),
        INVALID,
        "TRUNCATED_FILE",
    ),
    "an endless header": (content(struct.pack("<Q", 10_000_000_000) + b"{}"), INVALID, "DAMAGED_FILE"),
    "a config that is not JSON": (lambda d: (d / CONFIG).write_text("{" * 2000), INVALID, "INVALID_ADAPTER"),
    "another rank than its config's": (config(r=2), INVALID, "RANK_MISMATCH"),
    "an unknown method": (config(peft_type="XYZ"), INVALID, "UNKNOWN_METHOD"),
    "another method's config": (config(peft_type="PREFIX_TUNING"), INVALID, "INVALID_CONFIG"),
    "an option that is not served": (config(alora_invocation_tokens=[1]), INVALID, "INVALID_CONFIG"),
}


@pytest.fixture(scope="module")
def _traffic(server: ServerProcess) -> Iterator[None]:
    """A stream that runs during all of this module, and must end as it would have alone."""
    workers = {worker.pid for worker in server.workers()}
    with server.client() as client, streaming(client):
        yield
    assert workers <= {worker.pid for worker in server.workers()}, "the engine's processes must never restart"


@pytest.fixture
def adapter(adapters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters["lora-1"], tmp_path / "adapter"))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_with_its_reason(case: str, client: Client, adapter: Path) -> None:
    spoil, status, reason = BAD[case]
    spoil(adapter)
    with pytest.raises(DeltamuxError) as refused:
        client.upload_adapter(NAME, adapter)
    assert (refused.value.code.name, refused.value.reason) == (status, reason), refused.value.message
    assert client.list_adapters("tenants/mallory") == []


def test_a_rank_beyond_the_budget_is_refused(client: Client, base_directory: Path, tmp_path: Path) -> None:
    directory = write_own("lora", BaseModel.from_pretrained(base_directory), tmp_path / "wide", r=32)
    with pytest.raises(DeltamuxError, match="at most 16") as refused:
        client.upload_adapter(NAME, directory)
    assert (refused.value.code.name, refused.value.reason) == ("FAILED_PRECONDITION", "BUDGET_EXCEEDED")


def test_an_adapter_of_another_base_is_refused_by_its_fingerprint(client: Client, adapter: Path) -> None:
    save_file(load_file(adapter / TENSORS), adapter / TENSORS, metadata={"base_fingerprint": "0" * 32})
    with pytest.raises(DeltamuxError, match="fingerprint") as refused:
        client.upload_adapter(NAME, adapter)
    assert refused.value.reason == "BASE_MISMATCH"


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/b", "adapter_model.bin", "evil.py", ""])
def test_a_file_name_that_plays_tricks_is_refused(path: str, server: ServerProcess) -> None:
    header = pb.UploadHeader(adapter=NAME)
    header.files.add(path=CONFIG, size_bytes=2)
    header.files.add(path=TENSORS, size_bytes=8)
    header.files.add(path=path, size_bytes=4)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as raised:
        AdaptersStub(channel).UploadAdapter(iter([pb.UploadAdapterRequest(header=header)]), timeout=30)
    assert error_of(raised.value).code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "name", ["tenants/../adapters/x", "tenants/a/adapters/..", "tenants/A/adapters/x", "adapters/x"]
)
def test_a_resource_name_that_plays_tricks_is_refused(name: str, client: Client, adapter: Path) -> None:
    with pytest.raises(DeltamuxError) as refused:
        client.upload_adapter(name, adapter)
    assert refused.value.reason == "INVALID_NAME"


def test_what_only_the_engine_refuses_is_refused_before_it_is_stored(
    client: Client, base_directory: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    # It fits the base, but vLLM computes q_proj together with k_proj and v_proj: its input alone cannot be scaled.
    fused: dict[str, Any] = {"target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]}
    refused = write_own("ia3", BaseModel.from_pretrained(base_directory), tmp_path / "fused", **fused)
    name = "tenants/acme/adapters/steady"
    client.upload_adapter(name, adapters["lora-1"])
    before = client.generate([5, 6, 7], adapter=name, max_tokens=4, temperature=0.0)
    with pytest.raises(DeltamuxError, match="packed with other projections") as raised:
        client.upload_adapter(name, refused, promote=True)
    assert (raised.value.code.name, raised.value.reason) == ("FAILED_PRECONDITION", "BASE_MISMATCH")
    assert client.get_adapter(name).serving_version == 1
    assert [version.version for version in client.list_adapter_versions(name)] == [1]
    after = client.generate([5, 6, 7], adapter=name, max_tokens=4, temperature=0.0)
    assert (after.token_ids, after.adapter_version) == (before.token_ids, f"{name}/versions/1")
    client.delete_adapter(name)
