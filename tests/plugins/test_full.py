"""Full fine-tuning: embedding and head too, tied or not; and layer by layer from the top."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltamux.conformance.bases import save_base
from deltamux.deltas import BaseModel, DenseEmbedding, DenseHead, Program, merge_program
from deltamux.errors import InvalidConfigError, NotMergeableError
from deltamux.registry import Registry
from deltamux_testing.adapters import read_program, write_own
from deltamux_testing.training import logits


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel.from_pretrained(save_base(tmp_path_factory.mktemp("base"), request.param))


def tied(base: BaseModel) -> bool:
    assert base.head is not None
    return base.head.tied_to is not None


def test_every_parameter_of_the_base_is_trained_once(base: BaseModel) -> None:
    method = Registry().get("full")
    shapes = [spec.shape for spec in method.parameters(method.parse({}), base).values()]
    positions = 256 * 64 if base.architecture.startswith("GPT2") else 0
    assert sum(torch.Size(shape).numel() for shape in shapes) == base.num_parameters - positions
    assert tied(base) == base.architecture.startswith("GPT2")


def test_a_tied_head_changes_with_the_embedding_and_is_stored_once(base: BaseModel, tmp_path: Path) -> None:
    program = read_program(write_own("full", base, tmp_path), base)
    (table,) = [op.weight for _, op in program if isinstance(op, DenseEmbedding)]
    (head,) = [op.weight for _, op in program if isinstance(op, DenseHead)]
    assert torch.equal(table, head) == tied(base)
    names = {name for name in load_file(tmp_path / "adapter_model.safetensors") if "head" in name}
    assert names == (set() if tied(base) else {"lm_head.weight"})


def test_a_tied_head_that_changes_alone_is_served_and_not_merged(base: BaseModel) -> None:
    assert base.head is not None
    change = torch.randn(base.head.vocab_size, base.head.in_features) * 0.1
    program = Program.of([(base.head.name, DenseHead(change))])
    if tied(base):
        with pytest.raises(NotMergeableError, match="one weight for both"):
            merge_program(program, base)
    else:
        torch.testing.assert_close(
            merge_program(program, base)["lm_head.weight"], base.tensor("lm_head.weight") + change
        )


def test_layers_are_unfrozen_from_the_top_at_equal_distances(base: BaseModel) -> None:
    method = Registry().get("full")
    config = method.parse({"unfreeze": True})
    names = set(method.parameters(config, base))
    schedule = method.schedule(config, base, 30)
    unfrozen = [names - set(schedule.frozen(step)) for step in range(30)]
    top = {name for name in names if ".1." in name}
    bottom = {name for name in names if ".0." in name}
    assert unfrozen[0] == unfrozen[9]
    assert not unfrozen[0] & (top | bottom)
    assert unfrozen[0], "something learns from the first step"
    assert unfrozen[10] == unfrozen[0] | top
    assert unfrozen[20] == unfrozen[29] == names
    assert schedule.frozen(1000) == set()


def test_without_unfreezing_everything_learns_at_once(base: BaseModel) -> None:
    method = Registry().get("full")
    assert method.schedule(method.parse({}), base, 10).frozen(0) == ()
    with pytest.raises(InvalidConfigError, match="layers_per_stage"):
        method.parse({"layers_per_stage": 0})


def test_what_is_not_trained_has_no_tensor(base: BaseModel, tmp_path: Path) -> None:
    write_own("full", base, tmp_path, train_embedding=False, train_head=False)
    program = read_program(tmp_path, base)
    assert not [op for _, op in program if isinstance(op, DenseEmbedding | DenseHead)]


def test_the_top_layers_are_the_last_ones(tmp_path: Path) -> None:
    directory = save_base(tmp_path / "base", "qwen2")
    base = BaseModel.from_pretrained(directory)
    names = load_file(write_own("topk", base, tmp_path / "adapter") / "adapter_model.safetensors")
    assert {name for name in names if ".0." in name} == set()
    assert not torch.allclose(logits(directory, tmp_path / "adapter"), logits(directory), atol=1e-3)
