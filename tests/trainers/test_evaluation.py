"""Evaluation: on the adapter's own base, with answers that end at the server's end-of-sequence tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.bench.run import compile_adapters
from deltamux.conformance.bases import save_base
from deltamux.deltas import BaseModel
from deltamux.errors import BaseMismatchError
from deltamux_testing.adapters import write_own
from deltamux_trainers import EvaluateOptions, compose_directories, compress, evaluate, merge

COMMANDS: dict[str, Callable[[str, Path, Path, Path], Any]] = {
    "evaluate": lambda base, adapter, data, output: evaluate(EvaluateOptions(base, data, adapter)),
    "merge": lambda base, adapter, data, output: merge(base, adapter, output),
    "compress": lambda base, adapter, data, output: compress(base, adapter, output),
    "bench": lambda base, adapter, data, output: compile_adapters(
        {"a": adapter}, BaseModel.from_pretrained(base), output
    ),
    "compose": lambda base, adapter, data, output: compose_directories(base, [(adapter, 1.0)] * 2, output, mode="sum"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_of_another_base_is_refused(command: str, directory: Path, data: Path, tmp_path: Path) -> None:
    """Of equal shapes: its numbers would look like an adapter's that has learnt nothing."""
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(other)
    adapter = write_own("full", BaseModel.from_pretrained(directory), tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match="was trained on a base with fingerprint"):
        COMMANDS[command](str(other), adapter, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_answer_ends_at_the_tokenizers_end_token_as_the_servers_does(directory: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(directory, base)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    prompt = tokenizer("what?", return_tensors="pt").input_ids
    end = int(model(prompt).logits[0, -1].argmax())
    assert end != model.generation_config.eos_token_id
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["eos_token"] = tokenizer.convert_ids_to_tokens(end)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (data := tmp_path / "data.jsonl").write_text('{"prompt": "what?", "completion": ""}')
    assert evaluate(EvaluateOptions(str(base), data, generate=True)).exact_match == 1.0


def test_answers_go_as_far_as_the_bases_context(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")  # 256 learnt positions: one more would be an error
    rows = ({"prompt": "what? " * times, "completion": "yes"} for times in (1, 30))
    (data := tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    done = evaluate(EvaluateOptions(str(base), data, generate=True, max_new_tokens=300))
    assert (done.rows, done.exact_match) == (2, 0.0)
