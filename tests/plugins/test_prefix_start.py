"""A fresh prefix is what the base itself computes for a text, or for random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.conformance.bases import ARCHITECTURES, save_base
from deltamux.deltas import BaseModel, attached
from deltamux.errors import FailedPreconditionError, InvalidConfigError
from deltamux.registry import Registry
from deltamux_testing.training import IDS

TEXT = "a ticket"
PREFIX = Registry().get("prefix")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), request.param)


def fresh(base: BaseModel, **options: Any) -> dict[str, Tensor]:
    tensors = {}
    for name, spec in PREFIX.parameters(PREFIX.parse(options), base).items():
        tensors[name] = torch.empty(spec.shape)
        spec.init(tensors[name])
    return tensors


def test_a_prefix_fresh_from_a_text_gives_the_logits_that_follow_the_text(directory: Path) -> None:
    options = {"num_virtual_tokens": len(TEXT), "init_text": TEXT}
    base, model = BaseModel.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    text = AutoTokenizer.from_pretrained(directory).encode(TEXT, add_special_tokens=False)
    with torch.no_grad():
        expected = model(torch.cat([torch.tensor([text]), IDS], 1)).logits[:, len(text) :]
        with attached(model, base, PREFIX.program(PREFIX.parse(options), base, fresh(base, **options))):
            torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_loaded_model_is_run_itself(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    read, live = BaseModel.from_pretrained(directory), BaseModel.from_model(model)
    for options in ({"init_text": TEXT}, {}):
        starts = []
        for base in (read, live):
            torch.manual_seed(1)
            given = {**options, "tokenizer_name_or_path": str(directory)}
            starts.append(fresh(base, num_virtual_tokens=20, **given)["prompt_embeddings"])
        assert torch.equal(*starts)
    assert model.training


def test_what_peft_must_know_is_in_the_file_and_nothing_else(directory: Path) -> None:
    base = BaseModel.from_pretrained(directory)
    config = PREFIX.parse({"init_text": TEXT, "tokenizer_name_or_path": str(directory)})
    written = PREFIX.checkpoint(config, base, {}).config
    assert written["base_model_name_or_path"] == str(directory)
    assert not {"init_text", "tokenizer_name_or_path"} & set(written)


def test_a_text_does_not_go_with_another_start() -> None:
    for other in ({"prefix_projection": True}, {"init_weights": "zero"}, {"init_weights": "normal"}):
        with pytest.raises(InvalidConfigError, match="init_text goes neither"):
            PREFIX.parse({"init_text": TEXT, **other})


def test_without_the_weights_a_prefix_cannot_start(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(save_base(tmp_path, "llama"))
    with pytest.raises(FailedPreconditionError, match="not at hand"):
        fresh(BaseModel.from_config(model.config))
    assert fresh(BaseModel.from_config(model.config), init_weights="normal")["prompt_embeddings"].std() > 0.9
