"""A base that cannot run is refused at the start, with the cause, and not at its first request."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deltamux.conformance.bases import byte_tokenizer
from deltamux.deltas import BaseModel, Bottleneck, KVPrefix, LowRank, NormAffine, SiteKind, SoftPrompt
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.engine.vllm.frontend.warmup import warmup_programs
from deltamux.errors import FailedPreconditionError
from deltamux_testing.engines import started
from deltamux_testing.server_process import title

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
UNTIED = {"n_layer": 1, "n_head": 2, "tie_word_embeddings": False}
BASES: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "heads of size 16": (transformers.LlamaConfig, {"num_attention_heads": 4}, "BASE_CANNOT_RUN", "heads have size 16"),
    "no kernel": (transformers.MambaConfig, {"state_size": 16}, "BASE_CANNOT_RUN", "no attribute 'selective_scan_fwd'"),
    "a head of its own": (
        transformers.BloomConfig,
        UNTIED,
        "ENGINE_START_FAILED",
        "parameter named 'lm_head'",
    ),
}


@pytest.mark.engine
@pytest.mark.parametrize("case", BASES)
async def test_a_base_that_cannot_run_is_refused_with_the_cause(case: str, tmp_path: Path) -> None:
    kind, given, reason, cause = BASES[case]
    config: Any = kind(**{**SIZES, **given})
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers
    model.to(torch.float32).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(FailedPreconditionError, match=re.escape(cause)) as refused:
        async with started(tmp_path, enforce_eager=True):
            pass
    assert refused.value.reason == reason
    left = [p for p in set(psutil.Process().children(recursive=True)) - before if "EngineCore" in title(p)]
    assert not left, "an engine that is refused must leave no process"


@pytest.mark.engine
async def test_a_base_whose_answers_are_not_numbers_is_refused(base_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(base_directory, tmp_path / "base")
    weights = load_file(base_directory / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][3, 5] = math.nan
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FailedPreconditionError, match="is not a number: weights in its files are NaN") as refused:
        async with started(tmp_path / "base", enforce_eager=True):
            pass
    assert refused.value.reason == "BASE_CANNOT_RUN"


async def test_a_warm_up_leaves_nothing_in_the_engine(engine: VLLMEngine) -> None:
    stats = await engine.stats()
    assert not any(digest.startswith("warm-up") for digest in engine._host.digests())
    assert stats.running == 0


def test_the_programs_of_a_warmup_put_an_op_at_every_site_that_takes_one(base: BaseModel) -> None:
    bound = [(str(kind), name) for kind, name in base.sites]
    programs = warmup_programs(base, bound)
    placed = {(op.site_kind, site) for program in programs for site, op in program}
    assert placed == {site for site in base.sites if site[0] is not SiteKind.HEAD}
    assert {type(op) for program in programs for _, op in program} == {
        LowRank,
        Bottleneck,
        NormAffine,
        KVPrefix,
        SoftPrompt,
    }
    assert warmup_programs(base, [("linear", base.linears[0].name)])[0].placements[0].site == base.linears[0].name
    assert warmup_programs(base, []) == []
