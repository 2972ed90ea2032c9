"""The GPU benchmark without a GPU: it says so, and what it would run on is written as vLLM and deltamux read it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.gpu.__main__ import DEFAULT, Measured, parse, table
from benchmarks.gpu.engine_process import EngineProcess, EngineProcessError
from benchmarks.gpu.engines import Load
from benchmarks.gpu.inputs import LORAS, GPUInputs
from benchmarks.inputs import Size
from deltamux.deltas import Program

TESTS = Path(__file__).resolve().parents[1]


def test_the_command_parses_what_it_documents() -> None:
    given = parse(["--size", "8b", "--engines", "vllm", "deltas-graphs", "--repeats", "5", "--output", "x.json"])
    assert (given.size, given.engines, given.repeats, given.output) == (
        "8b",
        ["vllm", "deltas-graphs"],
        5,
        Path("x.json"),
    )
    assert parse([]).engines == DEFAULT == ["vllm", "vllm-lora", "deltas-graphs"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the command would run")
@pytest.mark.parametrize("command", ["gpu.__main__", "gpu.kernels", "gpu.search"])
def test_without_a_gpu_a_command_refuses_and_names_what_is_missing(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [command])
    assert import_module(f"benchmarks.{command}").main() == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.engine
def test_a_smoke_test_runs_the_whole_command_on_any_device(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--skip-tests", "--output", str(output)]
    done = subprocess.run(
        [*command, "--engines", "deltas-eager"], cwd=TESTS, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("deltas-eager")]
    rows = json.loads(output.read_text())["rows"]
    assert [row["workload"] for row in rows] == [
        *("base", "1 LoRA", "4 LoRAs", "16 LoRAs"),
        *("houlsby", "scale", "prefix", "mixed"),
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert len(printed) == len(rows)
    assert "a smoke test, whose figures mean nothing" in done.stdout


def test_ratios_are_to_vllms_own_base_in_the_same_round() -> None:
    rows = table([Measured("deltas-graphs", "base", [5.0, 9.0, 6.0]), Measured("vllm", "base", [10.0, 36.0, 8.0])])
    assert [(row["tokens_per_second"], row["of_base"]) for row in rows] == [(6.0, 0.5), (10.0, 1.0)]
    assert table([Measured("deltas-eager", "base", [5.0])])[0]["of_base"] is None


@pytest.mark.engine
def test_an_engine_that_does_not_start_ends_the_comparison(tmp_path: Path) -> None:
    inputs = GPUInputs.write(tmp_path, Size(512, 1), rank=8)
    (inputs.base / "config.json").unlink()
    process = EngineProcess("deltas-eager", inputs, Load(4, 8, 8, 0.1, 0.2))
    with pytest.raises(EngineProcessError, match="deltas-eager"):
        process.workloads()
    process.close()


def test_its_loras_are_the_same_in_pefts_files_and_as_programs(tmp_path: Path) -> None:
    inputs = GPUInputs.write(tmp_path, Size(512, 1), rank=8)
    assert len(inputs.peft) == LORAS
    model = AutoModelForCausalLM.from_pretrained(inputs.base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, inputs.peft[3])
    query: Any = peft.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    ops = dict(Program.load(inputs.programs["lora-3"].path))
    expected = ops["model.layers.0.self_attn.q_proj"].tensors()
    torch.testing.assert_close(query.lora_B.default.weight.float(), expected["b"].float(), atol=1e-3, rtol=1e-2)
    assert query.scaling["default"] == 1.0
