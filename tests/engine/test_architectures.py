"""Every op and method, on every architecture: what vLLM serves is what PEFT and the reference executor compute."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from deltamux.conformance.bases import save_base
from deltamux.conformance.parity import Greedy, assert_same, reference, served
from deltamux.deltas import BaseModel, Program, attached
from deltamux.engine.base import ProgramRef
from deltamux_testing import random_programs
from deltamux_testing.adapters import ARCHITECTURES, DISTINCT, peft_adapters, read_program, write_own, write_peft
from deltamux_testing.engines import started
from deltamux_trainers import compose_directories, compress

OWN_FORMAT = ("houlsby", "pfeiffer", "parallel", "bitfit", "mam", "unipelt", "topk", "full")
PROMPT = (5, 17, 99, 200, 3, 42, 77)
TOKENS = 8


def every_op(base: BaseModel) -> dict[str, Program]:
    return {
        "op-low-rank": random_programs.low_rank(base, 1),
        "op-bias": random_programs.bias(base, 2),
        "op-bottleneck": random_programs.bottleneck(base, 3),
        "op-bottleneck-parallel": random_programs.bottleneck(base, 4, parallel=True),
        "op-bottleneck-residual": random_programs.bottleneck(base, 9, residual=True),
        "op-bottleneck-parallel-residual": random_programs.bottleneck(base, 10, parallel=True, residual=True),
        "op-scale": random_programs.scale(base, 7),
        "op-soft-prompt": random_programs.soft_prompt(base, 8),
        "op-prefix": random_programs.prefix(base, 5),
        "op-everything": random_programs.everything(base, 6),
    }


@pytest.mark.engine
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_one_batch_serves_what_peft_and_the_reference_executor_generate(
    architecture: str, tmp_path: Path
) -> None:
    directory = save_base(tmp_path / "base", architecture)
    base = BaseModel.from_pretrained(directory)
    own = every_op(base)
    own |= composed(directory, base, tmp_path)
    own |= compressed(write_own("full", base, tmp_path / "plain"), directory, base, tmp_path)
    for method in OWN_FORMAT:
        own[method] = read_program(write_own(method, base, tmp_path / method), base)
    names = [name for name in peft_adapters(architecture) if name in DISTINCT]
    peft_models = {name: write_peft(name, architecture, directory, tmp_path / name) for name in names}
    programs = {**own, **{name: read_program(tmp_path / name, base) for name in names}}

    def references() -> dict[str | None, Greedy]:
        model = AutoModelForCausalLM.from_pretrained(directory)
        made: dict[str | None, Greedy] = {None: reference(model, PROMPT, TOKENS)}
        for name, program in own.items():
            with attached(model, base, program):
                made[name] = reference(model, PROMPT, TOKENS)
        return made | {name: reference(peft_model, PROMPT, TOKENS) for name, peft_model in peft_models.items()}

    refs = {name: random_programs.saved(program, tmp_path, name) for name, program in programs.items()}
    answers, expected = await asyncio.gather(serve(directory, refs), asyncio.to_thread(references))
    assert answers.keys() == expected.keys()
    for name, answer in answers.items():
        assert_same(expected[name], answer)
    for name in programs:
        assert answers[name].logprobs != answers[None].logprobs, f"{name} must be visible, or this test could not fail"


def composed(directory: Path, base: BaseModel, tmp_path: Path) -> dict[str, Program]:
    parts = [(write_own(method, base, tmp_path / f"part-{method}"), 1.0) for method in ("lora", "houlsby", "prefix")]
    compose_directories(str(directory), parts, tmp_path / "stack")
    compose_directories(str(directory), [(parts[0][0], 0.5), (parts[0][0], 2.0)], tmp_path / "sum", mode="sum")
    return {name: read_program(tmp_path / name, base) for name in ("stack", "sum")}


def compressed(adapter: Path, directory: Path, base: BaseModel, tmp_path: Path) -> dict[str, Program]:
    for form in ("bitdelta", "svd"):
        compress(str(directory), adapter, tmp_path / form, form=form, rank=8)
    return {form: read_program(tmp_path / form, base) for form in ("bitdelta", "svd")}


async def serve(directory: Path, refs: dict[str, ProgramRef]) -> dict[str | None, Greedy]:
    """Starts an engine and answers PROMPT as the base and as every adapter, all at once."""
    async with started(directory) as engine:
        names: list[str | None] = [None, *refs]
        jobs = (served(engine, PROMPT, refs[n] if n else None, TOKENS, n or "plain") for n in names)
        return dict(zip(names, await asyncio.gather(*jobs), strict=True))
