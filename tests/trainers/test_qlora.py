"""QLoRA: training over four-bit weights, with a LoRA as the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltamux.deltas import BaseModel
from deltamux.errors import InvalidArgumentError, InvalidConfigError
from deltamux.registry import Registry
from deltamux_plugins.qlora import dequantised
from deltamux_testing.adapters import write_own
from deltamux_testing.training import logits, logits_of_peft, options
from deltamux_trainers import EvaluateOptions, evaluate, merge, train


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_it_trains_over_four_bits_and_the_full_base_serves_the_result(
    optimizer: str, directory: Path, data: Path, tmp_path: Path
) -> None:
    train(options("qlora", directory, data, tmp_path, config={"r": 4}, max_steps=40, optimizer=optimizer))
    before = evaluate(EvaluateOptions(str(directory), data))
    after = evaluate(EvaluateOptions(str(directory), data, adapter=tmp_path))
    assert after.loss < before.loss - 1.0


def test_the_base_that_is_trained_over_is_held_in_four_bits(directory: Path) -> None:
    base = BaseModel.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    qlora = Registry().get("qlora")
    config = qlora.parse({})
    assert qlora.prepare(config, base, model)
    for site in base.linears:
        weight = model.get_submodule(site.name).weight
        assert weight.dtype == torch.uint8
        assert weight.numel() == site.in_features * site.out_features / 2
    inputs = torch.randn(3, base.linears[0].in_features)
    expected = inputs @ dequantised(config, base.tensor(f"{base.linears[0].name}.weight")).t()
    torch.testing.assert_close(model.get_submodule(base.linears[0].name)(inputs), expected, atol=1e-4, rtol=1e-4)


def test_its_files_are_those_of_lora_here_and_in_peft(directory: Path, tmp_path: Path) -> None:
    base = BaseModel.from_pretrained(directory)
    write_own("qlora", base, tmp_path, r=4, quant_type="fp4")
    theirs = logits_of_peft(directory, tmp_path)
    torch.testing.assert_close(logits(directory, tmp_path), theirs, atol=1e-4, rtol=1e-4)


def test_merging_into_the_dequantised_base_reports_the_distance_to_the_base(directory: Path, tmp_path: Path) -> None:
    base = BaseModel.from_pretrained(directory)
    write_own("qlora", base, tmp_path / "adapter", r=4)
    exact = merge(str(directory), tmp_path / "adapter", tmp_path / "exact")
    quantised = merge(str(directory), tmp_path / "adapter", tmp_path / "quantised", method_name="qlora")
    assert exact.error == 0.0
    assert exact.method == "lora"
    assert 0.01 < quantised.error < 0.2
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    weights = [f"{site.name}.weight" for site in base.linears]
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    model.requires_grad_(False)
    plain.requires_grad_(False)
    difference = sum(float((model.get_parameter(n) - plain.get_parameter(n)).square().sum()) for n in weights)
    size = sum(float(plain.get_parameter(n).square().sum()) for n in weights)
    assert quantised.error == pytest.approx((difference / size) ** 0.5, rel=1e-3)


def test_a_method_that_does_not_read_the_files_merges_nothing(directory: Path, tmp_path: Path) -> None:
    write_own("ia3", BaseModel.from_pretrained(directory), tmp_path / "adapter")
    with pytest.raises(InvalidArgumentError, match="'qlora' does not read"):
        merge(str(directory), tmp_path / "adapter", tmp_path / "merged", method_name="qlora")


@pytest.mark.parametrize("values", [{"quant_type": "int3"}, {"use_dora": True}, {"bias": "all"}])
def test_what_cannot_be_trained_over_four_bits_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError):
        Registry().get("qlora").parse(values)
