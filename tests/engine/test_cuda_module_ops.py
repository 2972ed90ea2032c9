"""The kernels in the real engine, in Triton's interpreter: slow, so one engine, one mixed batch and few tokens.

The worker runs its steps as CUDA graphs would be replayed: nothing of a step's content is left to Python.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from deltamux.conformance.parity import assert_same, reference, served
from deltamux.deltas import BaseModel, Program, attached
from deltamux.engine.base import ProgramRef
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux_testing.engines import PROFILES, replayed, started
from deltamux_testing.mixed_batches import PROGRAMS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

NAMES = [name for name in PROGRAMS if name not in ("low-rank-other", "prefix-long")]
TOKENS = 3


@pytest.fixture(scope="module")
async def replaying(base_directory: Path, real_engine: None) -> AsyncIterator[VLLMEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # the engine's processes inherit it
        worker = {"worker_cls": "deltamux_testing.workers.ReplayingWorker"}
        options = {"max_active_adapters": len(NAMES), "enforce_eager": True, "engine_arguments": worker}
        async with started(base_directory, **options) as engine:
            yield engine


async def test_a_mixed_batch_by_kernels_is_what_the_reference_executor_computes(
    replaying: VLLMEngine, programs: dict[str, ProgramRef], base: BaseModel, base_directory: Path
) -> None:
    prompts = {name: [5 + i, 17, 99, 200, 3, 42][: 3 + i % 4] for i, name in enumerate((None, *NAMES))}
    together = await asyncio.gather(
        *(
            served(replaying, tuple(prompt), programs[name] if name else None, TOKENS, f"kernels-{name}")
            for name, prompt in prompts.items()
        )
    )
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    for (name, prompt), mixed in zip(prompts.items(), together, strict=True):
        if name is None:
            assert_same(reference(model, prompt, TOKENS), mixed)
            continue
        with attached(model, base, Program.load(programs[name].path)):
            assert_same(reference(model, prompt, TOKENS), mixed)


async def test_a_step_replays_the_least_graph_that_serves_its_adapters(
    replaying: VLLMEngine, programs: dict[str, ProgramRef]
) -> None:
    for name, profiles in PROFILES.items():
        before = await replayed(replaying)
        await served(replaying, (9, 8, 7), programs[name], 2, f"profile-{name}")
        after = await replayed(replaying)
        assert {key for key, count in after.items() if count != before.get(key)} == profiles, name
