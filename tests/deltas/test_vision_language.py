"""Bases that read images as well: the sites are those of the language model, however large the other part is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from deltamux.deltas import BaseModel
from deltamux.engine.base import EngineOptions
from deltamux.engine.vllm.frontend.config import engine_config
from deltamux.errors import FailedPreconditionError

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6]}
# As many layers, and as wide, as the language model: neither may tell the two apart.
VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
CONFIGS: dict[str, Any] = {
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config={**SIZES, "rope_scaling": ROPE},
        vision_config={"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 64, "patch_size": 14},
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_scaling": ROPE}, vision_config={**VISION, "patch_size": 14}
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config={**SIZES, "head_dim": 32, "rope_scaling": ROPE},
        vision_config={**VISION, "patch_size": 16, "deepstack_visual_indexes": [0]},
    ),
    "gemma3": lambda: Gemma3Config(
        text_config={**SIZES, "head_dim": 32},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
}


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_the_sites_are_those_of_the_language_model(make: Any) -> None:
    config: PretrainedConfig = make()
    base = BaseModel.from_config(config)
    named = [*(site.name for site in base.linears), *(site.name for site in base.norms), base.embedding.name]
    assert all(name.startswith("model.language_model.") for name in named)
    assert len(base.linears) == 2 * 7
    assert len(base.blocks) == 4
    assert base.head is not None
    assert (base.head.name, base.head.vocab_size) == ("lm_head", 300)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_start_without_torchvision_names_it(tmp_path: Path) -> None:
    auto: Any = AutoModelForImageTextToText
    auto.from_config(CONFIGS["qwen2_5_vl"]()).save_pretrained(tmp_path)
    with pytest.raises(FailedPreconditionError, match="pip install torchvision") as refused:
        engine_config(EngineOptions(str(tmp_path), max_model_len=64))
    assert refused.value.reason == "TORCHVISION_MISSING"
