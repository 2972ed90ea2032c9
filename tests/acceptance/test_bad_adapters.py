"""Every way an adapter can be bad: refused at upload, with the reason, while other streams run on."""

from __future__ import annotations

import json
import pickle
import struct
import threading
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
from deltamux_testing.server_process import ServerProcess

NAME = "tenants/mallory/adapters/bad"
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def change_tensors(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(directory / TENSORS)
    change(tensors)
    save_file(tensors, directory / TENSORS)


def change_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **values}))


def first(tensors: dict[str, Any]) -> str:
    return next(iter(sorted(tensors)))


def wrong_shapes(directory: Path) -> None:
    change_tensors(directory, lambda t: t.update({first(t): torch.zeros(4, 96)}))


def missing_tensor(directory: Path) -> None:
    change_tensors(directory, lambda t: t.pop(first(t)))


def unknown_tensor(directory: Path) -> None:
    change_tensors(directory, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}))


def not_finite(directory: Path) -> None:
    change_tensors(directory, lambda t: t[first(t)].view(-1)[7:8].fill_(float("nan")))


def integers(directory: Path) -> None:
    change_tensors(directory, lambda t: t.update({first(t): t[first(t)].to(torch.int8)}))


def truncated(directory: Path) -> None:
    data = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes(data[: len(data) // 2])


def a_pickle(directory: Path) -> None:
    (directory / TENSORS).write_bytes(pickle.dumps({"weights": [1.0] * 100}))


def ten_gigabytes(directory: Path) -> None:
    claim = {"x": {"dtype": "F32", "shape": [50_000, 50_000], "data_offsets": [0, 10_000_000_000]}}
    header = json.dumps(claim).encode()
    (directory / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)


def endless_header(directory: Path) -> None:
    (directory / TENSORS).write_bytes(struct.pack("<Q", 10_000_000_000) + b"{}")


def no_json(directory: Path) -> None:
    (directory / CONFIG).write_text("{" * 2000)


BAD: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "tensors of another base": (wrong_shapes, "FAILED_PRECONDITION", "BASE_MISMATCH"),
    "a missing tensor": (missing_tensor, "INVALID_ARGUMENT", "MISSING_TENSOR"),
    "an unknown tensor": (unknown_tensor, "INVALID_ARGUMENT", "UNCLAIMED_TENSOR"),
    "a NaN": (not_finite, "INVALID_ARGUMENT", "NOT_FINITE"),
    "int8 factors": (integers, "INVALID_ARGUMENT", "INVALID_ADAPTER"),
    "a truncated file": (truncated, "INVALID_ARGUMENT", "TRUNCATED_FILE"),
    "a pickle in disguise": (a_pickle, "INVALID_ARGUMENT", "PICKLE"),
    "a claim of ten gigabytes": (ten_gigabytes, "INVALID_ARGUMENT", "TRUNCATED_FILE"),
    "an endless header": (endless_header, "INVALID_ARGUMENT", "DAMAGED_FILE"),
    "a config that is not JSON": (no_json, "INVALID_ARGUMENT", "INVALID_ADAPTER"),
    "another rank than its config's": (lambda d: change_config(d, r=2), "INVALID_ARGUMENT", "RANK_MISMATCH"),
    "an unknown method": (lambda d: change_config(d, peft_type="XYZ"), "INVALID_ARGUMENT", "UNKNOWN_METHOD"),
    "another method's config": (
        lambda d: change_config(d, peft_type="PREFIX_TUNING"),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
    ),
    "an option that is not served": (
        lambda d: change_config(d, alora_invocation_tokens=[1]),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
    ),
}


@pytest.fixture(scope="module")
def _traffic(server: ServerProcess) -> Iterator[None]:
    """A stream that runs during all of this module, and must end as it would have alone."""
    prompt = [5, 6, 7]
    options: dict[str, Any] = {"max_tokens": 100, "temperature": 0.0, "ignore_eos": True}
    problems: list[str] = []
    done = threading.Event()
    with server.client() as client:
        alone = client.generate(prompt, **options).token_ids
        workers = {worker.pid for worker in server.workers()}

        def stream() -> None:
            while not done.is_set():
                got = tuple(t for chunk in client.generate_stream(prompt, **options) for t in chunk.token_ids)
                if got != alone:
                    problems.append("a stream changed")

        thread = threading.Thread(target=stream)
        thread.start()
        yield
        done.set()
        thread.join()
    assert not problems
    assert workers <= {worker.pid for worker in server.workers()}, "the engine's processes must never restart"


@pytest.fixture
def adapter(adapters: dict[str, Path], tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(adapters["lora-1"], tmp_path / "adapter"))


@pytest.mark.usefixtures("_traffic")
@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_with_its_reason(case: str, client: Client, adapter: Path) -> None:
    spoil, status, reason = BAD[case]
    spoil(adapter)
    with pytest.raises(DeltamuxError) as refused:
        client.upload_adapter(NAME, adapter)
    assert (refused.value.code.name, refused.value.reason) == (status, reason), refused.value.message
    assert client.list_adapters("tenants/mallory") == []


@pytest.mark.usefixtures("_traffic")
def test_a_rank_beyond_the_budget_is_refused(client: Client, base_directory: Path, tmp_path: Path) -> None:
    directory = write_own("lora", BaseModel.from_pretrained(base_directory), tmp_path / "wide", r=32)
    with pytest.raises(DeltamuxError, match="at most 16") as refused:
        client.upload_adapter(NAME, directory)
    assert (refused.value.code.name, refused.value.reason) == ("FAILED_PRECONDITION", "BUDGET_EXCEEDED")


@pytest.mark.usefixtures("_traffic")
def test_an_adapter_of_another_base_is_refused_by_its_fingerprint(client: Client, adapter: Path) -> None:
    tensors = load_file(adapter / TENSORS)
    save_file(tensors, adapter / TENSORS, metadata={"base_fingerprint": "0" * 32})
    with pytest.raises(DeltamuxError, match="fingerprint") as refused:
        client.upload_adapter(NAME, adapter)
    assert refused.value.reason == "BASE_MISMATCH"


@pytest.mark.usefixtures("_traffic")
@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/b", "adapter_model.bin", "evil.py", ""])
def test_a_file_name_that_plays_tricks_is_refused(path: str, server: ServerProcess) -> None:
    header = pb.UploadHeader(adapter=NAME)
    header.files.add(path=CONFIG, size_bytes=2)
    header.files.add(path=TENSORS, size_bytes=8)
    header.files.add(path=path, size_bytes=4)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as raised:
        AdaptersStub(channel).UploadAdapter(iter([pb.UploadAdapterRequest(header=header)]), timeout=30)
    assert error_of(raised.value).code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.usefixtures("_traffic")
@pytest.mark.parametrize(
    "name", ["tenants/../adapters/x", "tenants/a/adapters/..", "tenants/A/adapters/x", "adapters/x"]
)
def test_a_resource_name_that_plays_tricks_is_refused(name: str, client: Client, adapter: Path) -> None:
    with pytest.raises(DeltamuxError) as refused:
        client.upload_adapter(name, adapter)
    assert refused.value.reason == "INVALID_NAME"


@pytest.mark.usefixtures("_traffic")
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
    assert (raised.value.code.name, raised.value.reason) == ("FAILED_PRECONDITION", "PROGRAM_REFUSED")
    assert client.get_adapter(name).serving_version == 1
    assert [version.version for version in client.list_adapter_versions(name)] == [1]
    after = client.generate([5, 6, 7], adapter=name, max_tokens=4, temperature=0.0)
    assert (after.token_ids, after.adapter_version) == (before.token_ids, f"{name}/versions/1")
    client.delete_adapter(name)
