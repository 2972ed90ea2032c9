"""Programs from a file into memory: complete, on its own, and while steps run."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from deltamux.deltas import BaseModel, LowRank, Program, SignDense
from deltamux.engine.vllm.loading.blocks import in_one_block, on_device
from deltamux.engine.vllm.loading.loader import Loaded, ProgramLoader, outcome
from deltamux.errors import InvalidAdapterError
from deltamux_testing import random_programs
from deltamux_testing.device_transfers import DeviceTransfers


def test_a_packed_program_is_the_program_in_memory_of_its_own(base: BaseModel, tmp_path: Path) -> None:
    program = random_programs.everything(base, 1)
    ref = random_programs.saved(program, tmp_path, "everything")
    moved = in_one_block(Program.load(ref.path), torch.float32)
    # Nothing may be left in the file, not even a page of it.
    ref.path.write_bytes(bytes(ref.path.stat().st_size))
    assert moved.num_virtual_tokens == program.num_virtual_tokens
    for (site, op), (moved_site, moved_op) in zip(program, moved, strict=True):
        assert (site, op.name, op.attributes()) == (moved_site, moved_op.name, moved_op.attributes())
        for field, tensor in op.tensors().items():
            assert torch.equal(tensor, moved_op.tensors()[field])
            assert moved_op.tensors()[field].is_contiguous()
            assert moved_op.tensors()[field].data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("low_rank", "parameter"),
    [
        (LowRank(torch.full((2, 64), 1e30), torch.zeros(64, 2)), "a"),
        (LowRank(torch.zeros(2, 64), torch.full((64, 2), 6e4), scale=2.0), "scale * b"),
        (LowRank(torch.zeros(2, 64), torch.zeros(64, 2), scale=float("inf")), "scale * b"),
    ],
)
def test_what_is_not_finite_after_the_cast_is_named(low_rank: LowRank, parameter: str) -> None:
    with pytest.raises(InvalidAdapterError) as refused:
        in_one_block(Program.of([("somewhere", low_rank)]), torch.float16)
    assert refused.value.reason == "NOT_FINITE"
    assert refused.value.metadata == {"site": "somewhere", "parameter": parameter}


def test_bits_are_not_cast() -> None:
    signs = torch.randint(256, (64, 8), dtype=torch.uint8)
    [(_, moved)] = in_one_block(Program.of([("somewhere", SignDense(signs, 0.5))]), torch.bfloat16)
    assert torch.equal(moved.tensors()["signs"], signs)
    assert moved.attributes() == {"scale": 0.5}


def test_a_packed_program_moves_to_a_device_by_one_copy_for_its_floats_and_one_for_each_tensor_of_bits(
    base: BaseModel,
) -> None:
    bits = ("bits", SignDense(torch.randint(256, (64, 8), dtype=torch.uint8), 0.5))
    program = in_one_block(Program.of([*random_programs.everything(base, 1), bits]), torch.bfloat16)
    assert len(list(program)) > 10
    with DeviceTransfers() as crossings:
        on_meta = on_device(program, torch.device("meta"))
    assert len(crossings.ops) == 2
    moved = on_device(program, torch.device("cpu"))
    assert on_meta.num_virtual_tokens == moved.num_virtual_tokens == program.num_virtual_tokens
    for (site, op), (_, there), (moved_site, same) in zip(program, on_meta, moved, strict=True):
        assert (site, op.name, op.attributes()) == (moved_site, same.name, same.attributes())
        for field, tensor in op.tensors().items():
            assert torch.equal(tensor, same.tensors()[field])
            assert there.tensors()[field].shape == tensor.shape
            assert there.tensors()[field].dtype == tensor.dtype
            assert there.tensors()[field].is_contiguous()


class Gate:
    """Reads nothing until it is opened."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.open = threading.Event()

    def read(self, path: Path, sha256: str = "") -> Program:
        self.open.wait(10)
        if path.name == "broken":
            raise InvalidAdapterError("the file is broken")
        return self._program


def settled(future: Future[Loaded]) -> str:
    if not future.cancelled():
        future.exception(timeout=10)
    return outcome(future)


def test_a_step_has_a_program_only_when_it_is_loaded_and_not_dropped(base: BaseModel) -> None:
    gate = Gate(random_programs.bias(base, 1))
    loader = ProgramLoader(gate.read)
    first, second = loader.load(1, Path("one")), loader.load(2, Path("two"))
    assert loader.load(1, Path("one")) is first
    assert not loader.ready
    loader.drop(1)  # under way
    gate.open.set()
    assert settled(second) == "ready"
    assert settled(first) in ("ready", "failed: dropped")
    assert list(loader.ready) == [2]
    assert loader.ids() == [2]
    loader.drop(2)
    assert not loader.ready
    assert loader.status(2) == "absent"


def test_a_file_that_is_not_what_was_stored_is_damaged_and_not_refused(base: BaseModel, tmp_path: Path) -> None:
    path = random_programs.saved(random_programs.low_rank(base, 1), tmp_path, "stored").path
    stored = hashlib.sha256(path.read_bytes()).hexdigest()
    loader = ProgramLoader(Program.load)
    assert settled(loader.load(1, path, stored)) == "ready"
    assert settled(loader.load(2, path, "0" * 64)).startswith("damaged: its file is damaged")
    assert settled(loader.load(3, tmp_path / "gone", stored)) == "damaged: its file is missing"
    assert settled(loader.load(4, tmp_path / "gone")).startswith("failed: ")


def test_a_load_that_fails_leaves_the_others_alone(base: BaseModel) -> None:
    gate = Gate(random_programs.bias(base, 1))
    gate.open.set()
    loader = ProgramLoader(gate.read)
    broken, good = loader.load(1, Path("broken")), loader.load(2, Path("good"))
    assert settled(broken) == "failed: the file is broken"
    assert settled(good) == "ready"
    assert loader.status(1) == "failed: the file is broken"
