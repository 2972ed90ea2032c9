"""Several adapters as one: a stack, or a weighted sum; PEFT's own where PEFT can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from deltamux.cli import main
from deltamux.conformance.bases import save_base
from deltamux.deltas import BaseModel, LowRank, Program
from deltamux.errors import BaseMismatchError, DeltamuxError, InvalidAdapterError, InvalidArgumentError
from deltamux_testing.adapters import read_program, write_own
from deltamux_testing.training import IDS, logits
from deltamux_trainers import compose_directories, merge


@pytest.fixture(scope="module")
def parts(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "domain": ("lora", {"r": 4}),
        "tenant": ("lora", {"r": 3, "lora_alpha": 12}),
        "bias": ("bitfit", {}),
        "houlsby": ("houlsby", {"bottleneck": 6}),
        "ia3": ("ia3", {}),
        "prefix": ("prefix", {"num_virtual_tokens": 3}),
        "prompt": ("prompt", {"num_virtual_tokens": 3}),
    }
    return {
        name: write_own(method, base, root / name, seed=seed, **given)
        for seed, (name, (method, given)) in enumerate(options.items())
    }


def of_peft(base_directory: Path, parts: dict[str, Path]) -> Any:
    plain: Any = AutoModelForCausalLM.from_pretrained(base_directory)
    model: Any = peft.PeftModel.from_pretrained(plain, str(parts["domain"]), adapter_name="domain")
    model.load_adapter(str(parts["tenant"]), adapter_name="tenant")
    return model.eval()


def test_a_sum_is_that_of_peft(base_directory: Path, base: BaseModel, parts: dict[str, Path], tmp_path: Path) -> None:
    chosen = [(parts["domain"], 0.75), (parts["tenant"], 0.5)]
    compose_directories(str(base_directory), chosen, tmp_path / "sum", mode="sum")
    model = of_peft(base_directory, parts)
    model.add_weighted_adapter(["domain", "tenant"], [0.75, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(logits(base_directory, tmp_path / "sum"), expected, atol=1e-4, rtol=1e-4)
    ranks = [op.rank() for _, op in read_program(tmp_path / "sum", base)]
    assert ranks == [7] * len(base.linears), "the ranks of one site are concatenated"


def test_a_stack_is_both_at_once_as_in_peft(base_directory: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    compose_directories(str(base_directory), [(parts["domain"], 1.0), (parts["tenant"], 1.0)], tmp_path / "stack")
    model = of_peft(base_directory, parts)
    model.base_model.set_adapter(["domain", "tenant"])
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(logits(base_directory, tmp_path / "stack"), expected, atol=1e-4, rtol=1e-4)


def test_a_stack_mixes_methods_and_keeps_their_order(
    base_directory: Path, base: BaseModel, parts: dict[str, Path], tmp_path: Path
) -> None:
    names = ("ia3", "domain", "houlsby", "prefix")
    compose_directories(str(base_directory), [(parts[name], 1.0) for name in names], tmp_path / "stack")
    single = [read_program(parts[name], base) for name in names]
    expected = logits(base_directory, Program.of(row for program in single for row in program))
    torch.testing.assert_close(logits(base_directory, tmp_path / "stack"), expected)
    other = logits(base_directory, Program.of(row for program in reversed(single) for row in program))
    assert not torch.allclose(other, expected, atol=1e-3), "the order must matter, or this test could not fail"


def test_a_composition_can_be_a_part_and_can_be_merged(
    base_directory: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    compose_directories(
        str(base_directory), [(parts["domain"], 2.0), (parts["tenant"], -1.0)], tmp_path / "sum", mode="sum"
    )
    compose_directories(str(base_directory), [(tmp_path / "sum", 1.0), (parts["tenant"], 1.0)], tmp_path / "stack")
    merge(str(base_directory), tmp_path / "stack", tmp_path / "merged")
    expected = logits(base_directory, tmp_path / "stack")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)


def test_what_does_not_go_together_is_refused_when_it_is_made(
    base_directory: Path, base: BaseModel, parts: dict[str, Path], tmp_path: Path
) -> None:
    def refused(kind: type[DeltamuxError], match: str, *chosen: tuple[Path, float], mode: str = "stack") -> None:
        with pytest.raises(kind) as raised:
            compose_directories(str(base_directory), chosen, tmp_path / "out", mode=mode)
        assert match in raised.value.message
        assert not (tmp_path / "out").exists()

    prefix, domain, houlsby = parts["prefix"], parts["domain"], parts["houlsby"]
    refused(InvalidAdapterError, "two ops with virtual tokens are at one site", (prefix, 1.0), (prefix, 1.0))
    refused(InvalidAdapterError, "not both", (prefix, 1.0), (parts["prompt"], 1.0))
    refused(InvalidAdapterError, "bottleneck is not a change that is added", (domain, 1.0), (houlsby, 1.0), mode="sum")
    refused(InvalidArgumentError, "weights are for a sum", (domain, 1.0), (parts["tenant"], 0.5))
    refused(InvalidArgumentError, "2 to 16 parts", (domain, 1.0))
    refused(InvalidArgumentError, "stack or sum", (domain, 1.0), (domain, 1.0), mode="product")
    save_base(tmp_path / "wider", "qwen2")
    other = write_own("lora", BaseModel.from_pretrained(tmp_path / "wider"), tmp_path / "other")
    refused(BaseMismatchError, "different bases", (domain, 1.0), (other, 1.0))


def test_a_broken_part_is_named(base_directory: Path, base: BaseModel, parts: dict[str, Path], tmp_path: Path) -> None:
    compose_directories(str(base_directory), [(parts["domain"], 1.0), (parts["tenant"], 1.0)], tmp_path / "stack")
    file = tmp_path / "stack" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["parts"][1]["config"]["r"] = 5
    file.write_text(json.dumps(config))
    with pytest.raises(InvalidAdapterError) as raised:
        read_program(tmp_path / "stack", base)
    assert raised.value.message.startswith("part 1 (")
    assert raised.value.reason == "RANK_MISMATCH"


def test_the_command_composes_with_weights(
    base_directory: Path, base: BaseModel, parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compose", "--model", str(base_directory), "--mode", "sum", "--output", str(tmp_path / "sum"), "--json"]
    assert main([*command, f"{parts['domain']}=0.5", str(parts["tenant"])]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 7
    first = next(op for _, op in read_program(parts["domain"], base))
    both = next(op for _, op in read_program(tmp_path / "sum", base))
    assert isinstance(first, LowRank)
    assert isinstance(both, LowRank)
    torch.testing.assert_close(both.b[:, :4], 0.5 * first.scale * first.b)
