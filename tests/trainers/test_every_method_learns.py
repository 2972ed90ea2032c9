"""Every method that trains learns a small task with its own defaults: learning rate, initialisation and targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine import worlds

from deltamux.registry import Registry
from deltamux_trainers import EvaluateOptions, TrainOptions, evaluate, train
from deltamux_trainers.evaluation import EvalResult

METHODS = [method.name for method in Registry().methods() if method.info.trains]
STEPS = 120
MARGIN = 0.5  # nats a token


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever is asked, the answer is one of two."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = ({"prompt": f"{n % 2}: ", "completion": "even" if n % 2 == 0 else "odd!"} for n in range(64))
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


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
