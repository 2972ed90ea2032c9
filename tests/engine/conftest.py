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
from deltamux_testing.mixed_batches import NAMES, PROGRAMS, Request

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
    directory = tmp_path_factory.mktemp("programs")
    return {name: random_programs.saved(make(base), directory, name) for name, make in PROGRAMS.items()}


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
