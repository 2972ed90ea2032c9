"""The training loop: every method learns, a run resumes exactly, and the files are what is served."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.deltas import BaseModel
from deltamux.registry import Registry
from deltamux_testing import training
from deltamux_testing.training import assert_equal, logits, logits_of_peft, tensors
from deltamux_trainers import TrainOptions, read_config, train
from deltamux_trainers.data.collator import DataCollator
from deltamux_trainers.data.dataset import load_dataset
from deltamux_trainers.data.tokenization import RowTokenizer
from deltamux_trainers.model import causal_lm_loss

pytestmark = pytest.mark.slow


def options(method: str, directory: Path, data: Path, output: Path, **given: Any) -> TrainOptions:
    common = {"max_steps": 40, "log_steps": 100}
    return training.options(method, directory, data, output, **{**common, **given})


OF_PEFT = [m.name for m in Registry().methods() if m.info.in_peft and m.info.trains]
SMALL: dict[str, dict[str, Any]] = {
    "vera": {"r": 16},
    "oft": {"oft_block_size": 8},
    "adalora": {"init_r": 4, "target_r": 2},
    "prompt": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4},
    "prefix": {"num_virtual_tokens": 4, "prefix_projection": True},
}


@pytest.mark.parametrize("method", OF_PEFT)
def test_peft_loads_what_was_trained_with_equal_logits(
    method: str, directory: Path, data: Path, tmp_path: Path
) -> None:
    train(options(method, directory, data, tmp_path, max_steps=4, config=SMALL.get(method, {})))
    ours = logits(directory, tmp_path)
    torch.testing.assert_close(ours, logits_of_peft(directory, tmp_path), atol=1e-4, rtol=1e-4)


def test_a_run_that_was_killed_goes_on_exactly_where_it_was(directory: Path, data: Path, tmp_path: Path) -> None:
    given = {"config": {"r": 4, "lora_dropout": 0.1}, "batch_size": 4, "eval_steps": 5, "max_steps": 150}
    killed_options = options("lora", directory, data, tmp_path / "killed", **given)
    script = (
        f"from pathlib import PosixPath; from deltamux_trainers import TrainOptions, train; train({killed_options!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while len(list(checkpoints.glob("checkpoint-*/trainer_state.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "adapter_config.json").exists(), "a killed run must not look like an adapter"
    train(options("lora", directory, data, tmp_path / "killed", resume=True, **given))
    train(options("lora", directory, data, tmp_path / "straight", **given))
    assert_equal(tmp_path / "killed", tmp_path / "straight")


def test_gradient_accumulation_equals_the_larger_batch(directory: Path, data: Path, tmp_path: Path) -> None:
    train(options("lora", directory, data, tmp_path / "large", batch_size=16, max_steps=4))
    train(options("lora", directory, data, tmp_path / "small", batch_size=4, gradient_accumulation=4, max_steps=4))
    large, small = (tensors(tmp_path / name) for name in ("large", "small"))
    for name in large:
        torch.testing.assert_close(large[name], small[name], atol=1e-4, rtol=1e-3)


def test_the_loss_is_the_mean_over_the_completion(directory: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    row = load_dataset(data, RowTokenizer.for_base(BaseModel.from_pretrained(directory), tokenizer)).sequences[0]
    prompt = len(tokenizer.encode("0: "))
    batch = DataCollator(0)([row])
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        predicted = model(input_ids=batch["input_ids"]).logits
    chosen = [-torch.log_softmax(predicted[0, i - 1], -1)[row.input_ids[i]] for i in range(prompt, len(row.input_ids))]
    torch.testing.assert_close(causal_lm_loss(predicted, batch["labels"]), torch.stack(chosen).mean())


def test_options_come_from_a_file_and_from_overrides(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("r: 8\nlora_alpha: 32\n")
    config = read_config(tmp_path / "config.yaml", ["r=2", "target_modules=[q_proj, v_proj]"])
    assert config == {"r": 2, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
