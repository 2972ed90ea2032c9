"""HRA is a product of reflections: exact at its rank, and PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltamux.deltas import BaseModel, LowRank
from deltamux.errors import InvalidConfigError
from deltamux.registry import Registry
from deltamux_testing.adapters import read_program, write_own
from deltamux_testing.training import IDS, logits


def test_it_is_the_product_of_its_reflections_at_its_own_rank(base: BaseModel, tmp_path: Path) -> None:
    write_own("hra", base, tmp_path, r=4)
    directions = load_file(tmp_path / "adapter_model.safetensors")
    for site, op in read_program(tmp_path, base):
        assert isinstance(op, LowRank)
        assert op.rank() == 4
        weight = base.tensor(f"{site}.weight")
        reflected = weight
        for u in directions[f"base_model.model.{site}.hra_u"].unbind(1):
            reflected = reflected - 2 * torch.outer(reflected @ u, u) / (u @ u)
        torch.testing.assert_close(weight + op.b @ op.a, reflected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_peft_computes_the_same(orthogonal: bool, base_directory: Path, tmp_path: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(base_directory)
    config = peft.HRAConfig(r=3, apply_GS=orthogonal, init_weights=False, target_modules=["q_proj", "down_proj"])
    theirs: Any = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(logits(base_directory, tmp_path), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(base_directory), expected, atol=1e-2)


@pytest.mark.parametrize("values", [{"r": 0}, {"bias": "hra_only"}])
def test_what_cannot_be_served_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match="|".join(values)):
        Registry().get("hra").parse(values)


@pytest.mark.parametrize("values", [{"r": 3}, {"apply_GS": True}])
def test_what_does_not_begin_as_the_identity_is_not_trained(values: dict[str, Any], base: BaseModel) -> None:
    method = Registry().get("hra")
    with pytest.raises(InvalidConfigError, match="even in training"):
        method.parameters(method.parse(values), base)
