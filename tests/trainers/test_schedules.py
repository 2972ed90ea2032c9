"""Schedules of methods in training runs: pruning, gradual unfreezing, and resuming; and default learning rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from deltamux.deltas import BaseModel
from deltamux.registry import Registry
from deltamux_testing.adapters import read_program
from deltamux_testing.training import StopAt, Stopped, assert_equal, options
from deltamux_trainers import TrainOptions, train
from deltamux_trainers.options import default_rate

RANKS = {"init_r": 6, "target_r": 2}


class Watch(TrainerCallback):
    """Records the parameters that have changed since the start, at the end of every step."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._start = {name: tensor.detach().clone() for name, tensor in model.parameters_by_name().items()}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        present = model.parameters_by_name()
        self.moved.append({name for name, start in self._start.items() if not torch.equal(present[name], start)})


@pytest.mark.slow
def test_adalora_ends_with_its_target_ranks(directory: Path, data: Path, tmp_path: Path) -> None:
    train(options("adalora", directory, data, tmp_path, config=RANKS, max_steps=20, batch_size=8))
    base = BaseModel.from_pretrained(directory)
    ranks = [op.rank() for _, op in read_program(tmp_path, base)]
    assert sum(ranks) == 2 * len(base.linears)
    assert max(ranks) > 2, "the ranks go to where they matter"
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["total_step"], written["tinit"], written["tfinal"]) == (20, 2, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stops", "given"),
    [
        ("adalora", 11, {"config": RANKS, "eval_steps": 8, "max_steps": 20, "batch_size": 8}),
        ("full", 3, {"config": {"unfreeze": True}, "save_steps": 2, "max_steps": 5, "learning_rate": 1e-3}),
    ],
)
def test_a_run_that_is_resumed_equals_one_that_is_not(
    method: str, stops: int, given: dict[str, Any], directory: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        train(options(method, directory, data, tmp_path / "stopped", **given), StopAt(stops))
    train(options(method, directory, data, tmp_path / "stopped", resume=True, **given))
    train(options(method, directory, data, tmp_path / "straight", **given))
    assert_equal(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.slow
def test_full_fine_tuning_unfreezes_its_layers_from_the_top(directory: Path, data: Path, tmp_path: Path) -> None:
    watch = Watch()
    train(options("full", directory, data, tmp_path, config={"unfreeze": True}, max_steps=9), watch)
    top = {name for name in watch.moved[-1] if ".layers.1." in name}
    bottom = {name for name in watch.moved[-1] if ".layers.0." in name}
    assert top
    assert bottom
    assert not watch.moved[2] & (top | bottom)
    assert top <= watch.moved[3]
    assert not watch.moved[5] & bottom
    assert bottom <= watch.moved[6]


@pytest.mark.parametrize(
    ("method", "hidden_size", "expected"),
    [
        ("lora", 4096, 2e-4),
        ("lora", 8192, 1e-4),  # as QLoRA's table 9 has it
        ("lora", 512, 1.6e-3),
        ("lora", 64, 3.2e-3),
        ("lora", 65536, 5e-5),
        ("ia3", 64, 3e-3),
        ("prompt", 8192, 3e-2),
    ],
)
def test_rates_of_matrices_go_with_one_over_the_width_and_those_of_vectors_stay(
    method: str, hidden_size: int, expected: float
) -> None:
    assert default_rate(Registry().get(method).info, hidden_size) == pytest.approx(expected)


def test_a_given_learning_rate_is_used() -> None:
    options = TrainOptions(method="lora", model="", data=Path(), output=Path(), learning_rate=0.5)
    assert options.rate(Registry().get("lora").info, 64) == 0.5
