"""Every op, on every architecture: what vLLM serves equals what the reference executor computes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from deltamux.deltas import BaseModel, Program, attached
from deltamux.engine.base import EngineOptions
from deltamux.engine.vllm.engine import VLLMEngine
from engine import worlds
from engine.conftest import OPTIONS
from engine.parity import assert_same, reference, served

PROMPT = (5, 17, 99, 200, 3, 42, 77)


def every_op(base: BaseModel) -> dict[str, Program]:
    return {
        "low-rank": worlds.random_low_rank(base, 1),
        "bias": worlds.random_bias(base, 2),
        "bottleneck": worlds.random_bottleneck(base, 3),
        "bottleneck-parallel": worlds.random_bottleneck(base, 4, parallel=True),
        "prefix": worlds.random_prefix(base, 5),
        "everything": worlds.random_everything(base, 6),
    }


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gpt2", "opt"])
async def test_one_batch_of_every_op_equals_the_reference_executor(architecture: str, tmp_path: Path) -> None:
    directory = worlds.save_base(tmp_path / "base", architecture)
    base = BaseModel.from_pretrained(directory)
    programs = every_op(base)
    engine = VLLMEngine(EngineOptions(str(directory), **OPTIONS))  # type: ignore[arg-type]  # a dict of the common ones
    await engine.start()
    try:
        jobs = [
            served(engine, PROMPT, worlds.saved(program, tmp_path, name), 16, name)
            for name, program in programs.items()
        ]
        plain, *answers = await asyncio.gather(served(engine, PROMPT, None, 16, "plain"), *jobs)
    finally:
        await engine.stop()
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert_same(reference(model, PROMPT, 16), plain)
    for (name, program), answer in zip(programs.items(), answers, strict=True):
        with attached(model, base, program):
            assert_same(reference(model, PROMPT, 16), answer)
        assert answer.logprobs != plain.logprobs, f"{name} must be visible, or this test could not fail"
