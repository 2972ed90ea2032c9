"""Every method that trains learns a small task with its own defaults: learning rate, initialisation and targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltamux.registry import Registry
from deltamux_trainers import EvaluateOptions, TrainOptions, evaluate, train
from deltamux_trainers.tools.evaluate import EvalResult

pytestmark = pytest.mark.slow

METHODS = [method.name for method in Registry().methods() if method.info.trains]
STEPS = 120
MARGIN = 0.5  # nats a token


@pytest.fixture(scope="module")
def before(directory: Path, data: Path) -> EvalResult:
    return evaluate(EvaluateOptions(str(directory), data))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_with_its_defaults_beats_the_base_clearly(
    method: str, directory: Path, data: Path, before: EvalResult, tmp_path: Path
) -> None:
    options = TrainOptions(method, str(directory), data, tmp_path, max_steps=STEPS, batch_size=16, quiet=True)
    result = train(options)
    after = evaluate(EvaluateOptions(str(directory), data, adapter=tmp_path))
    assert after.loss < before.loss - MARGIN
    assert json.loads((tmp_path / "train_report.json").read_text())["parameters"] == result.parameters > 0
    files = {"adapter_config.json", "adapter_model.safetensors", "train_report.json"}
    assert {file.name for file in tmp_path.iterdir()} == files
