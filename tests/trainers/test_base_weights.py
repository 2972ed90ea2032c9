"""Base weights trained in place (full and topk): equal to plain fine-tuning, with their deltas in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from deltamux.conformance.bases import save_base
from deltamux.deltas import BaseModel
from deltamux.errors import NotMergeableError
from deltamux_testing import training
from deltamux_testing.training import IDS, logits, tensors
from deltamux_trainers import EvaluateOptions, TrainOptions, evaluate, merge, train
from deltamux_trainers.data.collator import DataCollator
from deltamux_trainers.data.dataset import load_dataset
from deltamux_trainers.data.tokenization import RowTokenizer

pytestmark = pytest.mark.slow

STEPS, RATE = 5, 1e-3


class Watch(TrainerCallback):
    """Records the trainable parameters and the number of forward hooks."""

    trainable: set[str]
    hooks: int

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def options(method: str, directory: Path, data: Path, output: Path, **given: Any) -> TrainOptions:
    common = {"max_steps": STEPS, "batch_size": 64, "learning_rate": RATE, "scheduler": "constant"}
    return training.options(method, directory, data, output, **{**common, **given})


def plainly_tuned(directory: Path, data: Path, trained: set[str]) -> Any:
    """The base after as many steps of plain fine-tuning, all rows in each batch."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenize = RowTokenizer.for_base(BaseModel.from_pretrained(directory), tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    batch = DataCollator(0)(load_dataset(data, tokenize).sequences)
    labels = batch.pop("labels")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        predictions = model(**batch).logits[:, :-1]
        loss: Any = F.cross_entropy(predictions.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["full", "topk"])
def test_it_is_plain_fine_tuning_and_the_files_hold_the_change(
    method: str, architecture: str, data: Path, tmp_path: Path
) -> None:
    directory = save_base(tmp_path / "base", architecture)
    config = json.loads((directory / "config.json").read_text())
    still = {name: 0.0 for name in config if name.endswith("_pdrop")}  # two runs never drop the same
    (directory / "config.json").write_text(json.dumps({**config, **still}))
    watch = Watch()
    train(options(method, directory, data, tmp_path / "adapter"), watch)
    files = tensors(tmp_path / "adapter")
    assert watch.hooks == 0
    assert watch.trainable == {f"base_model.{name}" for name in files}
    tuned = plainly_tuned(directory, data, set(files))
    with torch.no_grad():
        expected = tuned(IDS).logits
    torch.testing.assert_close(logits(directory, tmp_path / "adapter"), expected, atol=2e-3, rtol=1e-3)
    for name, change in files.items():
        assert change.dtype == torch.float32
        assert change.any(), name


def test_over_a_bfloat16_base_the_weights_are_float32_and_small_changes_stay(
    directory: Path, data: Path, tmp_path: Path
) -> None:
    train(options("full", directory, data, tmp_path / "adapter", dtype="bfloat16", learning_rate=1e-5))
    files = tensors(tmp_path / "adapter")
    for name, change in files.items():
        moved = change.abs().max()
        assert 1e-6 < moved < 1e-3, name
    before, after = (evaluate(EvaluateOptions(str(directory), data, adapter=a)) for a in (None, tmp_path / "adapter"))
    assert after.loss < before.loss


def test_where_the_embedding_is_scaled_the_change_itself_is_trained(data: Path, tmp_path: Path) -> None:
    """A change of such an embedding's rows is not the change of its output, which is what is served."""
    from transformers import GemmaConfig, GemmaForCausalLM

    base = save_base(tmp_path / "llama", "llama")
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model: Any = GemmaForCausalLM(config)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    model.save_pretrained(tmp_path / "gemma")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "gemma")
    directory = tmp_path / "gemma"
    result = train(options("full", directory, data, tmp_path / "adapter"))
    after = evaluate(EvaluateOptions(str(directory), data, adapter=tmp_path / "adapter"))
    assert after.loss < result.loss
    with pytest.raises(NotMergeableError, match=r"scales the output of model\.embed_tokens"):
        merge(str(directory), tmp_path / "adapter", tmp_path / "merged")
