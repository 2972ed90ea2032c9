"""One engine a session for most tests; each of the others starts its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deltamux.deltas import BaseModel
from deltamux.engine.base import EngineOptions, ProgramRef
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from engine import worlds

SLOTS = 4
"""Fewer than the programs below, so that mixed batches make slots change hands."""

OPTIONS = {"dtype": "float32", "max_model_len": 256, "kv_cache_gib": 0.25, "max_num_seqs": 16}


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="session")
def base(base_directory: Path) -> BaseModel:
    return BaseModel.from_pretrained(base_directory)


@pytest.fixture(scope="session")
async def engine(base_directory: Path) -> AsyncIterator[VLLMEngine]:
    """An engine that splits prompts of more than 24 tokens, caches prefixes, and is told what another plugin needs."""
    options = EngineOptions(
        str(base_directory),
        max_active_adapters=SLOTS,
        max_host_adapters=6,
        engine_arguments={
            "max_num_batched_tokens": 24,
            "block_size": 32,
            "additional_config": {"a plugin": "of vLLM's"},
        },
        **OPTIONS,  # type: ignore[arg-type]  # a plain dict of the common ones
    )
    engine = VLLMEngine(options)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture(scope="session")
def programs(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProgramRef]:
    """One program of every kind, and the same kinds of other tenants."""
    directory = tmp_path_factory.mktemp("programs")
    made = {
        "low-rank": worlds.random_low_rank(base, 1),
        "low-rank-wide": worlds.random_low_rank(base, 2, rank=16),
        "low-rank-other": worlds.random_low_rank(base, 3),
        "bottleneck": worlds.random_bottleneck(base, 4),
        "bottleneck-parallel": worlds.random_bottleneck(base, 5, parallel=True, activation="gelu"),
        "bottleneck-residual": worlds.random_bottleneck(base, 12, residual=True),
        "prefix": worlds.random_prefix(base, 6),
        "prefix-long": worlds.random_prefix(base, 7, length=40),
        "bias": worlds.random_bias(base, 8),
        "scale": worlds.random_scale(base, 10),
        "soft-prompt": worlds.random_soft_prompt(base, 11, length=30),
        "everything": worlds.random_everything(base, 9),
    }
    return {name: worlds.saved(program, directory, name) for name, program in made.items()}
