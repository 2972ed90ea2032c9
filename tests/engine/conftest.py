"""One engine per session for most tests; each of the others starts its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from deltamux.conformance.parity import Greedy, reference
from deltamux.deltas import BaseModel, Program, attached
from deltamux.engine.base import ProgramRef
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux_testing import random_programs
from deltamux_testing.engines import started
from deltamux_testing.mixed_batches import NAMES, Request

SLOTS = 4
"""Fewer than the programs below, so that mixed batches make slots change hands."""


@pytest.fixture(scope="session")
async def engine(base_directory: Path, real_engine: None) -> AsyncIterator[VLLMEngine]:
    """An engine that splits prompts of more than 24 tokens, caches prefixes, and has an argument for another plugin."""
    arguments = {"max_num_batched_tokens": 24, "block_size": 32, "additional_config": {"a plugin": "of vLLM's"}}
    options = {"max_active_adapters": SLOTS, "max_host_adapters": 6, "engine_arguments": arguments}
    async with started(base_directory, **options) as engine:
        yield engine


@pytest.fixture(scope="session")
def programs(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProgramRef]:
    """One program of every kind, and the same kinds of other tenants."""
    directory = tmp_path_factory.mktemp("programs")
    made = {
        "low-rank": random_programs.low_rank(base, 1),
        "low-rank-wide": random_programs.low_rank(base, 2, rank=16),
        "low-rank-other": random_programs.low_rank(base, 3),
        "bottleneck": random_programs.bottleneck(base, 4),
        "bottleneck-parallel": random_programs.bottleneck(base, 5, parallel=True, activation="gelu"),
        "bottleneck-residual": random_programs.bottleneck(base, 12, residual=True),
        "prefix": random_programs.prefix(base, 6),
        "prefix-long": random_programs.prefix(base, 7, length=40),
        "bias": random_programs.bias(base, 8),
        "scale": random_programs.scale(base, 10),
        "soft-prompt": random_programs.soft_prompt(base, 11, length=30),
        "everything": random_programs.everything(base, 9),
    }
    return {name: random_programs.saved(program, directory, name) for name, program in made.items()}


@pytest.fixture(scope="session")
def expected(base: BaseModel, base_directory: Path, programs: dict[str, ProgramRef]) -> dict[Request, Greedy]:
    """What the reference executor generates of one prompt, by each adapter and by none."""
    prompt, num_tokens = (5, 17, 99, 200, 3, 42), 12
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    made: dict[Request, Greedy] = {(None, prompt, num_tokens): reference(model, prompt, num_tokens)}
    for name in NAMES:
        with attached(model, base, Program.load(programs[name].path)):
            made[name, prompt, num_tokens] = reference(model, prompt, num_tokens)
    return made
