"""Values that are not finite: an adapter or a base with one is refused by every command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltamux.cli import main
from deltamux.cli.output import plain
from deltamux.deltas import BaseModel
from deltamux.errors import DeltamuxError, InvalidAdapterError
from deltamux_testing.adapters import write_own
from deltamux_trainers import EvaluateOptions, compose_directories, compress, convert, evaluate, merge
from deltamux_trainers.tools.evaluate import EvalResult

Change = Callable[[Tensor], Tensor]


def changed(adapter: Path, change: Change) -> Path:
    """Changes the first tensor of an adapter's file."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    save_file(tensors | {first: change(tensors[first]).contiguous()}, file, metadata={"format": "pt"})
    return adapter


def holding(value: float) -> Change:
    return lambda tensor: torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 1, value, tensor.double())


@pytest.fixture
def adapters(directory: Path, tmp_path: Path) -> Callable[[str, Change], Path]:
    base = BaseModel.from_pretrained(directory)
    return lambda method, change: changed(write_own(method, base, tmp_path / method), change)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_no_command_reads_an_adapter_with_a_value_that_is_not_finite(
    value: float, directory: Path, data: Path, adapters: Callable[[str, Change], Path], tmp_path: Path
) -> None:
    lora, full = adapters("lora", holding(value)), adapters("full", holding(value))
    model, output = str(directory), tmp_path / "out"
    work: list[Callable[[], object]] = [
        lambda: convert(lora, output),
        lambda: evaluate(EvaluateOptions(model, data, lora, limit=2)),
        lambda: merge(model, lora, output),
        lambda: compress(model, full, output),
        lambda: compose_directories(model, [(lora, 1.0), (lora, 1.0)], output),
    ]
    for each in work:
        with pytest.raises(InvalidAdapterError, match="adapters hold finite numbers only") as refused:
            each()
        assert refused.value.reason == "NOT_FINITE"
        assert not output.exists()


def test_integers_are_not_converted_as_if_they_were_floats(
    adapters: Callable[[str, Change], Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidAdapterError, match=r"holds integers \(torch.int64\)"):
        convert(adapters("lora", lambda tensor: tensor.long()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", ["nan", "inf", "-1e999"])
def test_a_weight_that_is_not_finite_is_named(
    weight: str, directory: Path, adapters: Callable[[str, Change], Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lora = adapters("lora", torch.clone)
    given = [str(lora), f"{lora}={weight}", "--model", str(directory), "--mode", "sum", "--output"]
    assert main(["compose", *given, str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert f"the weight of {lora} is" in errors
    assert "field=parts" in errors


def test_a_base_whose_loss_is_not_finite_is_not_evaluated(directory: Path, data: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * math.nan}, weights, {"format": "pt"})
    with pytest.raises(DeltamuxError, match="the loss is nan: the base's weights are not finite") as refused:
        evaluate(EvaluateOptions(str(tmp_path), data, limit=2))
    assert refused.value.reason == "NOT_FINITE"


@pytest.mark.slow
def test_what_commands_print_is_json_also_where_a_figure_is_not_finite() -> None:
    printed = json.dumps(plain(EvalResult(1, 1, math.nan, math.inf, 0.5)), allow_nan=False)
    assert json.loads(printed)["perplexity"] is None
