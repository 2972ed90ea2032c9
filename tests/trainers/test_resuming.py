"""Resuming: with the losses of an uninterrupted run and the same settings, or refused with the reason."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from deltamux.conformance.bases import save_base
from deltamux.errors import FailedPreconditionError, InvalidConfigError
from deltamux_testing import training
from deltamux_testing.disks import flip
from deltamux_testing.training import assert_equal
from deltamux_trainers import TrainOptions, train
from deltamux_trainers.output_dir import write_errors
from deltamux_trainers.training.callbacks import TrainingInterrupted
from deltamux_trainers.training.train import TrainResult

pytestmark = pytest.mark.slow

STEPS = 12


class SignalAt(TrainerCallback):
    """Sends this process a signal within some step, as Ctrl-C or a scheduler would."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGINT) -> None:
        self._step, self._number = step, number

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step - 1:
            os.kill(os.getpid(), self._number)


class Losses(TrainerCallback):
    """Records the logged loss of each step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.by_step[state.global_step] = logs["loss"]


def options(directory: Path, data: Path, output: Path, **given: Any) -> TrainOptions:
    config = {"r": 2, "lora_dropout": 0.2, "target_modules": ["q_proj"]}
    common = {"config": config, "max_steps": STEPS, "batch_size": 4, "log_steps": 1}
    return training.options(given.pop("method", "lora"), directory, data, output, **{**common, **given})


def saved(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(directory: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Losses, TrainResult]:
    """The run that nothing interrupts."""
    losses = Losses()
    output = tmp_path_factory.mktemp("straight")
    return losses, train(options(directory, data, output, save_steps=4, keep_checkpoints=True), losses)


def equals(output: Path, result: TrainResult, losses: Losses, straight: tuple[Losses, TrainResult]) -> None:
    expected_losses, expected = straight
    assert losses.by_step == {step: expected_losses.by_step[step] for step in losses.by_step}
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_equal(output, expected.output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_run_saves_names_the_option_to_resume_and_loses_nothing(
    number: signal.Signals, directory: Path, data: Path, tmp_path: Path, straight: tuple[Losses, TrainResult]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match=f"after step 5 of {STEPS}; .* --resume"):
        train(options(directory, data, tmp_path), SignalAt(5, number))
    assert signal.getsignal(number) is before
    assert saved(tmp_path) == ["checkpoint-5"]
    losses = Losses()
    result = train(options(directory, data, tmp_path, resume=True), losses)
    assert list(losses.by_step) == list(range(6, STEPS + 1))
    equals(tmp_path, result, losses, straight)


def test_interrupting_between_evaluations_changes_neither_the_best_nor_the_patience(
    directory: Path, data: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"eval_fraction": 0.25, "patience": 2, "max_steps": None, "epochs": 2.0}
    with pytest.raises(TrainingInterrupted):
        train(options(directory, data, tmp_path / "stopped", **given), SignalAt(15))
    resumed = train(options(directory, data, tmp_path / "stopped", **given, resume=True))
    whole = train(options(directory, data, tmp_path / "straight", **given))
    assert (resumed.steps, resumed.eval_loss) == (whole.steps, whole.eval_loss)
    assert resumed.loss == pytest.approx(whole.loss)


def without_adapter(whole: Path, output: Path) -> Path:
    """Returns a run's output as it is while the adapter is not written yet."""
    shutil.copytree(whole / "checkpoints", output / "checkpoints")
    return output


def test_a_run_that_was_killed_before_its_adapter_was_written_trains_no_step_more(
    directory: Path, data: Path, tmp_path: Path, straight: tuple[Losses, TrainResult]
) -> None:
    output, losses = without_adapter(straight[1].output, tmp_path / "out"), Losses()
    result = train(options(directory, data, output, save_steps=4, resume=True), losses)
    assert (result.steps, losses.by_step) == (STEPS, {})
    equals(output, result, losses, straight)


def test_a_run_that_patience_ended_before_it_was_killed_is_not_trained_on(
    directory: Path, data: Path, tmp_path: Path
) -> None:
    given = {"eval_fraction": 0.25, "patience": 1, "max_steps": None, "epochs": 9.0, "learning_rate": 2.0}
    whole = train(options(directory, data, tmp_path / "whole", **given, keep_checkpoints=True))
    assert whole.steps < 9 * 12
    output = without_adapter(tmp_path / "whole", tmp_path / "out")
    result = train(options(directory, data, output, **given, resume=True))
    assert (result.steps, result.eval_loss) == (whole.steps, whole.eval_loss)
    assert result.loss == pytest.approx(whole.loss)


class KilledEvaluating(TrainerCallback):
    """Ends the run within its first evaluation, as a kill does: nothing is saved."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise SystemExit


def test_a_run_that_was_killed_while_evaluating_evaluates_that_pass_when_it_goes_on(
    directory: Path, data: Path, tmp_path: Path
) -> None:
    given = {"eval_fraction": 0.25, "max_steps": 24, "save_steps": 4, "keep_checkpoints": True}
    with pytest.raises(SystemExit):
        train(options(directory, data, tmp_path / "killed", **given), KilledEvaluating())
    assert saved(tmp_path / "killed")[-1] == "checkpoint-8", "the pass ends with step 12"
    logs = []
    for name, resume in (("killed", True), ("whole", False)):
        train(options(directory, data, tmp_path / name, **given, resume=resume))
        state = json.loads((tmp_path / name / "checkpoints" / "checkpoint-24" / "trainer_state.json").read_text())
        logs.append({entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry})
    assert list(logs[0]) == [12, 24]
    assert logs[0] == logs[1]


def test_the_command_line_ends_with_130_after_an_interruption(directory: Path, data: Path, tmp_path: Path) -> None:
    given = ["--method", "lora", "--model", str(directory), "--data", str(data), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "deltamux", "train", *given, "--max-steps", "100000", "--log-steps", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("step "))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == ""
    assert "of 100000; the checkpoint is saved. To go on, give the same command with --resume" in err
    assert "Traceback" not in err


def test_checkpoints_come_every_so_many_steps_and_the_last_two_stay(straight: tuple[Losses, TrainResult]) -> None:
    assert saved(straight[1].output) == ["checkpoint-12", "checkpoint-8"]


def test_the_best_checkpoint_is_kept_too(directory: Path, data: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"prompt": "0: ", "completion": "nothing like it"}\n')
    given: dict[str, Any] = {"eval_data": held_out, "eval_steps": 2, "save_steps": 3, "keep_checkpoints": True}
    result = train(options(directory, data, tmp_path / "out", **given, learning_rate=0.1))
    state = json.loads((tmp_path / "out" / "checkpoints" / "checkpoint-12" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert best < 10
    assert set(saved(tmp_path / "out")) == {"checkpoint-12", "checkpoint-10", f"checkpoint-{best}"}
    assert result.eval_loss == pytest.approx(losses[best])


def cut(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, Any] = {
    "cut": cut,
    "a bit flipped": lambda checkpoint: flip(checkpoint / "parameters.safetensors"),
    "a file missing": lambda checkpoint: (checkpoint / "scheduler.pt").unlink(),
    "no manifest": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "a manifest of brackets": lambda checkpoint: (checkpoint / "manifest.json").write_text("[" * 100_000),
    "a manifest of nothing": lambda checkpoint: (checkpoint / "manifest.json").write_text("{}"),
    "an empty manifest": lambda checkpoint: (checkpoint / "manifest.json").write_text(""),
}


@pytest.fixture(scope="module")
def stopped(directory: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped with two checkpoints."""
    output = tmp_path_factory.mktemp("stopped")
    with pytest.raises(TrainingInterrupted):
        train(options(directory, data, output, save_steps=4), SignalAt(6))
    return output


def copied(source: Path, destination: Path) -> Path:
    shutil.copytree(source, destination, dirs_exist_ok=True)
    return destination


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str,
    directory: Path,
    data: Path,
    tmp_path: Path,
    stopped: Path,
    straight: tuple[Losses, TrainResult],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = copied(stopped, tmp_path / "out")
    DAMAGES[damage](output / "checkpoints" / "checkpoint-6")
    losses = Losses()
    result = train(options(directory, data, output, resume=True), losses)
    assert min(losses.by_step) == 5
    equals(output, result, losses, straight)
    assert "checkpoint-6 is damaged" in caplog.text
    assert "resuming from checkpoint-4" in caplog.text


def test_with_every_checkpoint_damaged_nothing_is_made_up(
    directory: Path, data: Path, tmp_path: Path, stopped: Path
) -> None:
    output = copied(stopped, tmp_path / "out")
    for checkpoint in (output / "checkpoints").iterdir():
        cut(checkpoint)
    with pytest.raises(FailedPreconditionError, match=r"checkpoint-6 is damaged .*checkpoint-4 is damaged"):
        train(options(directory, data, output, resume=True))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"learning_rate": 0.5}, "learning_rate: saved 0.01, given 0.5"),
        ({"method": "ia3", "config": {}}, "method: saved 'lora', given 'ia3'"),
        ({"config": {"r": 3}}, "config.r: saved 2, given 3"),
        ({"batch_size": 8}, "batch_size: saved 4, given 8"),
        ({"gradient_accumulation": 2}, "gradient_accumulation: saved 1, given 2"),
        ({"seed": 1}, "seed: saved 0, given 1"),
        ({"scheduler": "cosine"}, "scheduler: saved 'linear', given 'cosine'"),
        ({"max_length": 9}, "max_length: saved 1024, given 9"),
        ({"dtype": "bfloat16"}, "dtype: saved 'float32', given 'bfloat16'"),
        ({"eval_fraction": 0.5}, "eval_fraction: saved 0.0, given 0.5"),
        ({"data": "other.jsonl"}, "data: saved "),
        ({"model": "other"}, "base: saved "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_going_on_with_another_run_is_refused_with_the_difference(
    given: dict[str, Any], line: str, directory: Path, data: Path, tmp_path: Path, stopped: Path
) -> None:
    if "data" in given:
        given = {"data": tmp_path / "other.jsonl"}
        given["data"].write_text(data.read_text() + '{"text": "more"}\n')
    if "model" in given:
        given, directory = {}, save_base(tmp_path / "other", "qwen2")
    with pytest.raises(FailedPreconditionError) as refused:
        train(options(directory, **{"data": data, "output": stopped, "resume": True, **given}))
    assert any(shown.strip().startswith(line) for shown in refused.value.message.splitlines())
    assert "Only epochs, max_steps" in refused.value.message


def test_a_run_may_go_on_for_longer_but_not_for_less(
    directory: Path, data: Path, tmp_path: Path, stopped: Path
) -> None:
    output = copied(stopped, tmp_path / "moved")
    with pytest.raises(InvalidConfigError, match="max_steps 5 is less than the 6"):
        train(options(directory, data, output, resume=True, max_steps=5))
    assert train(options(directory, data, output, resume=True, max_steps=STEPS + 1, log_steps=5)).steps == STEPS + 1


class SecondRun(TrainerCallback):
    """Begins another run with the same options while the first one trains."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.error: FailedPreconditionError | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with pytest.raises(FailedPreconditionError) as refused:
            train(self.options)
        self.error = refused.value


def test_two_runs_do_not_write_into_one_output(directory: Path, data: Path, tmp_path: Path) -> None:
    second = SecondRun(options(directory, data, tmp_path / "out", max_steps=1))
    train(second.options, second)
    assert second.error is not None
    assert second.error.reason == "OUTPUT_BUSY"
    assert "another run writes to" in second.error.message
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_an_output_that_nothing_was_written_to_does_not_stay(directory: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="less than one row"):
        train(options(directory, data, tmp_path / "out", eval_fraction=0.001))
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_removed_meanwhile_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="its directory is gone") as refused, write_errors(tmp_path):
        torch.save({}, tmp_path / "removed" / "optimizer.pt")
    assert refused.value.reason == "OUTPUT_NOT_WRITABLE"


@pytest.mark.parametrize("save_steps", [2, None], ids=["a checkpoint", "the adapter"])
def test_a_disk_that_is_full_is_a_sentence(save_steps: int | None, directory: Path, data: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    given: dict[str, Any] = {"save_steps": save_steps or 1000, "config": {"r": 64}, "max_steps": 2}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(FailedPreconditionError, match="cannot be written") as refused:
            train(options(directory, data, tmp_path, **given))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.reason == "OUTPUT_NOT_WRITABLE"
    assert save_steps is None or "the disk is full" in refused.value.message
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_run_that_diverges_writes_nothing(directory: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="training diverged"):
        train(options(directory, data, tmp_path, config={}, learning_rate=100.0, dtype="float16"))
    assert not (tmp_path / "adapter_config.json").exists()
