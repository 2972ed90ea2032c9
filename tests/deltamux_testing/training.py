"""What is trained: the logits of adapters, here and in PEFT, and a run that stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from deltamux.deltas import BaseModel, Program, attached
from deltamux_testing.adapters import read_program
from deltamux_trainers import TrainOptions

COMMON: dict[str, Any] = {"max_steps": 1, "batch_size": 16, "learning_rate": 1e-2, "quiet": True}
IDS = torch.tensor([[5, 17, 99, 200, 3, 42]])


def options(method: str, model: Path, data: Path, output: Path, **given: Any) -> TrainOptions:
    """Returns the options of a short run, with those that are given."""
    return TrainOptions(method=method, model=str(model), data=data, output=output, **{**COMMON, **given})


@torch.no_grad()
def logits(model: Path, adapter: Path | Program | None = None, ids: Tensor = IDS) -> Tensor:
    """Returns the logits of a model in float32, with an adapter attached where one is given."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is None:
        alone: Tensor = loaded(ids).logits
        return alone
    base = BaseModel.from_pretrained(model)
    with attached(loaded, base, read_program(adapter, base) if isinstance(adapter, Path) else adapter):
        adapted: Tensor = loaded(ids).logits
    return adapted


@torch.no_grad()
def logits_of_peft(model: Path, adapter: Path, ids: Tensor = IDS) -> Tensor:
    """Returns the logits of a model with an adapter that PEFT has loaded, without those of its virtual tokens."""
    loaded: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter))
    found: Tensor = loaded.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    return found


def tensors(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    """Asserts that two adapters have the same tensors, bit by bit."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Stopped(Exception):
    """The end of a run by `StopAt`."""


class StopAt(TrainerCallback):
    """Ends a run before a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stopped
