"""PEFT's files mean the same here: read from PEFT, written for PEFT, on five architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltamux.conformance.bases import save_base
from deltamux.conformance.parity import assert_same, reference
from deltamux.deltas import BaseModel, attached
from deltamux_testing.adapters import ARCHITECTURES, ONLY_ON_LINEAR, peft_adapters, read_program, write_own, write_peft
from deltamux_testing.training import logits, logits_of_peft

PROMPT = (5, 17, 99, 200, 3)


# One architecture is tried by `make test-fast`, all by `make test`.
MARKED = [pytest.param(name, marks=[pytest.mark.slow] if name != "llama" else []) for name in ARCHITECTURES]


@pytest.fixture(scope="module", params=MARKED)
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def directory(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp(architecture), architecture)


@pytest.fixture(scope="module")
def base(directory: Path) -> BaseModel:
    return BaseModel.from_pretrained(directory)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        pytest.param(architecture, name, marks=marked.marks)
        for marked, architecture in zip(MARKED, ARCHITECTURES, strict=True)
        for name in peft_adapters(architecture)
    ],
    indirect=["architecture"],
)
def test_what_peft_wrote_generates_what_peft_generates(
    name: str, architecture: str, directory: Path, base: BaseModel, tmp_path: Path
) -> None:
    expected = reference(write_peft(name, architecture, directory, tmp_path), PROMPT, 12)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert reference(model, PROMPT, 12).logprobs != expected.logprobs, "the adapter must be visible"
    with attached(model, base, read_program(tmp_path, base)):
        assert_same(expected, reference(model, PROMPT, 12))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"r": 4, "bias": "all", "use_rslora": True}),
        ("lora", {"r": 4, "bias": "lora_only", "lora_alpha": 16}),
        ("lora", {"r": 4, "use_dora": True}),
        ("adalora", {"init_r": 4, "target_r": 2}),
        ("vera", {"r": 16}),
        ("vera", {"r": 16, "save_projection": False, "projection_prng_key": 3}),
        ("loha", {"r": 3}),
        ("lokr", {"r": 2}),
        ("lokr", {"r": 2, "decompose_both": True, "decompose_factor": 4, "init_weights": "lycoris"}),
        ("oft", {"oft_block_size": 8}),
        ("oft", {"oft_block_size": 16, "block_share": True, "use_cayley_neumann": False}),
        ("ia3", {}),
        ("ln_tuning", {}),
        ("prompt", {"num_virtual_tokens": 6}),
        ("p_tuning", {"num_virtual_tokens": 6}),
        ("p_tuning", {"num_virtual_tokens": 6, "encoder_reparameterization_type": "LSTM"}),
        ("prefix", {"num_virtual_tokens": 6}),
        ("prefix", {"num_virtual_tokens": 6, "prefix_projection": True}),
    ],
)
def test_what_we_write_peft_loads_with_equal_logits(
    method: str, options: dict[str, Any], directory: Path, base: BaseModel, tmp_path: Path
) -> None:
    if method in ONLY_ON_LINEAR and base.linears[0].transposed:
        pytest.skip("PEFT does not attach it to transposed projections")
    ours = logits(directory, write_own(method, base, tmp_path, **options))
    torch.testing.assert_close(ours, logits_of_peft(directory, tmp_path), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, logits(directory), atol=1e-2), "the adapter must be visible"
