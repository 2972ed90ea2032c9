"""Two processes under torchrun are one run: one output, whole, with the losses that one process gets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltamux_testing.training import options, tensors
from deltamux_trainers import train

pytestmark = pytest.mark.slow


def command(directory: Path, data: Path, output: Path, *given: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own = ["--method", "lora", "--set", "r=2", "--model", str(directory), "--data", str(data), "--output", str(output)]
    options = ["--batch-size", "4", "--learning-rate", "1e-2", "--device", "cpu", "--log-steps", "1", "--json"]
    return [*torchrun, "-m", "deltamux", "train", *own, *options, *given]


def test_two_processes_write_one_output_equal_to_that_of_one(directory: Path, data: Path, tmp_path: Path) -> None:
    """Interrupted and resumed on the way, as torchrun's Ctrl-C does it: the signal reaches every process, twice."""
    output = tmp_path / "two"
    interrupted = command(directory, data, output, "--max-steps", "100000", "--scheduler", "constant")
    with subprocess.Popen(interrupted, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("step 2/"))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
    assert out == ""
    assert err.count("the checkpoint is saved") == 1
    (checkpoint,) = (output / "checkpoints").glob("checkpoint-*")
    steps = int(checkpoint.name.removeprefix("checkpoint-")) + 2
    more = ["--max-steps", str(steps), "--scheduler", "constant", "--resume"]
    run = subprocess.run(command(directory, data, output, *more), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    given = {"config": {"r": 2}, "batch_size": 8, "scheduler": "constant", "max_steps": steps, "device": "cpu"}
    one = train(options("lora", directory, data, tmp_path / "one", **given))
    assert (result["ranks"], result["steps"]) == (2, steps)
    assert result["loss"] == pytest.approx(one.loss, rel=1e-4)
    files = sorted(path.name for path in output.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "train_report.json"]
    ours, theirs = (tensors(tmp_path / name) for name in ("two", "one"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-2)
