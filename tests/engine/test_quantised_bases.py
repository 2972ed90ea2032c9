"""Adapters on a base whose projections are stored in 8 bits, against PEFT on the same base in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from deltamux.deltas import BaseModel, Program
from deltamux.engine.base import ProgramRef, SamplingOptions
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux_testing.adapters import read_program
from deltamux_testing.engines import started
from deltamux_testing.quantised_bases import Kind, write_quantised
from deltamux_testing.random_programs import saved

NOISE = 4
"""By how much an adapter's error may exceed the base's: inputs are quantised, and it changes them."""
PROMPT = (5, 17, 99, 200, 3, 42, 77, 23, 61, 12)
ADAPTERS: Mapping[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear"),
    "dora": peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules="all-linear"),
    "ia3": peft.IA3Config(),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4),
}
"""What adds to outputs, and DoRA and OFT, which are computed with the base's weights."""


@pytest.mark.parametrize("kind", ["int8", "float8"])
async def test_a_quantised_base_serves_each_adapter_as_exactly_as_itself(
    kind: Kind, base_directory: Path, real_engine: None, tmp_path: Path
) -> None:
    quantised = tmp_path / kind
    plain = write_quantised(base_directory, quantised, kind)
    base = BaseModel.from_pretrained(quantised)
    async with started(quantised, engine_arguments={"enforce_eager": True}) as engine:
        assert engine.support is not None
        assert engine.support.refused == {}
        expected = _logprobs(_model(plain))
        error = _difference(expected, await _served(engine, None))
        assert error < 0.5, "the base itself"
        for name, config in ADAPTERS.items():
            adapted = _adapted(plain, config, tmp_path / name)
            program = read_program(tmp_path / name, base)
            answer = _logprobs(adapted)
            found = _difference(answer, await _served(engine, _saved(program, tmp_path, name)))
            assert found < NOISE * error, name
            assert float((answer - expected).abs().max()) > error, f"{name}: the test could not fail"


def _model(directory: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def _adapted(base: Path, config: peft.PeftConfig, directory: Path) -> Any:
    torch.manual_seed(1)
    config.task_type = "CAUSAL_LM"
    model: Any = peft.get_peft_model(_model(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(directory))
    return model.eval()


def _saved(program: Program, directory: Path, name: str) -> ProgramRef:
    (directory / "programs").mkdir(exist_ok=True)
    return saved(program, directory / "programs", name)


def _logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    return torch.log_softmax(logits.float(), -1)


async def _served(engine: VLLMEngine, ref: ProgramRef | None) -> dict[int, float]:
    sampling = SamplingOptions(max_tokens=1, temperature=0.0, logprobs=20)
    request_id = ref.digest if ref else "base"
    (chunk,) = [c async for c in engine.generate(PROMPT, sampling, ref, request_id=request_id, stream=False)]
    return dict(chunk.logprobs[0].top)


def _difference(expected: torch.Tensor, found: Mapping[int, float]) -> float:
    return max(abs(float(expected[token]) - logprob) for token, logprob in found.items())
