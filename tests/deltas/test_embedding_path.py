"""Soft prompts need a base that makes the same of embeddings as of token ids, as PEFT gives it embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bases.configs import BASES, base_config
from deltamux.deltas import BaseModel, Program, SoftPrompt
from deltamux.errors import BaseMismatchError

SCALED = {"embedding_multiplier": 3.0}
GEMMA3N = {
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
GEMMA4 = {**LAYERS, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16, "global_head_dim": 32}


def described(name: str, values: Mapping[str, Any]) -> BaseModel:
    return BaseModel.from_config(base_config(name, values))


@pytest.mark.parametrize("name", BASES)
def test_bases_of_the_table_take_embeddings(name: str) -> None:
    assert described(name, {}).embedding.takes_embeddings


@pytest.mark.parametrize(
    ("name", "values", "takes"),
    [
        ("falcon_h1", SCALED, False),  # scales what it looks up itself
        ("falcon_h1", {"embedding_multiplier": 1.0}, True),
        ("granite", SCALED, True),  # scales what it is given as well
        ("gemma3n_text", {**GEMMA3N, **LAYERS, "activation_sparsity_pattern": [0.0, 0.0]}, False),  # looks up more
        ("gemma4_text", GEMMA4, False),  # looks for the ids of what it is given
    ],
)
def test_a_soft_prompt_is_refused_where_ids_and_their_embeddings_differ(
    name: str, values: Mapping[str, Any], takes: bool
) -> None:
    base = described(name, values)
    program = Program.of([(base.embedding.name, SoftPrompt(torch.zeros(2, base.embedding.features)))])
    if takes:
        program.placed(base)
    else:
        with pytest.raises(BaseMismatchError, match="soft prompts are not served on this base"):
            program.placed(base)


@pytest.mark.parametrize("values", [{}, SCALED])
def test_a_loaded_model_is_described_alike_and_draws_no_random_numbers(values: Mapping[str, Any]) -> None:
    config = base_config("falcon_h1", values)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers
    before = torch.get_rng_state()
    assert BaseModel.from_model(model.train()).embedding == BaseModel.from_config(config).embedding
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
