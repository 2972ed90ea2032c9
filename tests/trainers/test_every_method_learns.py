"""Every method that trains learns a small task with its own defaults: learning rate, initialisation and targets."""

from __future__ import annotations

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
    train(
        TrainOptions(
            method=method, model=str(directory), data=data, output=tmp_path, max_steps=STEPS, batch_size=16, quiet=True
        )
    )
    after = evaluate(EvaluateOptions(str(directory), data, adapter=tmp_path))
    assert after.loss < before.loss - MARGIN
