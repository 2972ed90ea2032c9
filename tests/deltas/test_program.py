"""Programs and their compiled files; the fingerprint of a base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine import worlds

from deltamux.deltas import BaseModel, Checkpoint, KVPrefix, LowRank, Program
from deltamux.errors import BaseMismatchError, InvalidAdapterError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def base(directory: Path) -> BaseModel:
    return BaseModel.from_pretrained(directory)


def test_a_compiled_file_holds_the_whole_program(base: BaseModel, tmp_path: Path) -> None:
    program = worlds.random_everything(base, 1)
    program.save(tmp_path / "program.safetensors")
    loaded = Program.load(tmp_path / "program.safetensors")
    assert loaded.num_virtual_tokens == program.num_virtual_tokens == 3
    for written, read in zip(program, loaded, strict=True):
        assert (read.site, type(read.op), read.op.attributes()) == (
            written.site,
            type(written.op),
            written.op.attributes(),
        )
        for name, tensor in written.op.tensors().items():
            assert torch.equal(read.op.tensors()[name], tensor)


def test_a_program_for_another_base_is_refused_by_its_first_wrong_shape(base: BaseModel) -> None:
    with pytest.raises(BaseMismatchError, match=r"low_rank\.a at model\.layers\.0.* has shape \[4, 128\]"):
        worlds.for_another_base(base).placed(base)


def test_a_site_that_the_base_lacks_is_named(base: BaseModel) -> None:
    with pytest.raises(BaseMismatchError, match=r"no linear site 'model\.layers\.9\.mlp\.up_proj'"):
        Program.of([("model.layers.9.mlp.up_proj", LowRank(torch.zeros(1, 64), torch.zeros(128, 1)))]).placed(base)


def test_prefixes_of_unequal_length_are_refused() -> None:
    prefixes = [
        (f"layers.{n}.attention", KVPrefix(torch.zeros(n + 1, 1, 32), torch.zeros(n + 1, 1, 32))) for n in (0, 1)
    ]
    with pytest.raises(InvalidAdapterError, match="equally long"):
        Program.of(prefixes)


def test_a_program_without_ops_is_refused() -> None:
    with pytest.raises(InvalidAdapterError, match="changes nothing"):
        Program.of([])


def test_a_value_that_is_finite_in_float32_only_is_found_after_the_cast(base: BaseModel) -> None:
    program = Program.of([(base.linears[0].name, LowRank(torch.full((1, 64), 1e6), torch.zeros(64, 1)))])
    program.check_finite()
    with pytest.raises(InvalidAdapterError, match=r"not finite in torch\.float16"):
        program.to(torch.float16).check_finite()


def test_a_base_keeps_its_fingerprint_in_bfloat16_and_loses_it_with_other_weights(
    directory: Path, base: BaseModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    model.bfloat16().save_pretrained(tmp_path / "bfloat16")
    assert BaseModel.from_pretrained(tmp_path / "bfloat16").fingerprint == base.fingerprint
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.5)
    model.save_pretrained(tmp_path / "changed")
    assert BaseModel.from_pretrained(tmp_path / "changed").fingerprint != base.fingerprint


def test_a_fifo_or_a_missing_file_is_refused_without_reading(tmp_path: Path) -> None:
    import os

    with pytest.raises(InvalidAdapterError, match=r"adapter_config\.json is missing"):
        Checkpoint.read(tmp_path)
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(InvalidAdapterError, match="not a regular file"):
        Checkpoint.read(tmp_path)
