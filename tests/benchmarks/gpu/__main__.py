"""Throughput on a GPU: the base, vLLM's own LoRA, and deltas, as ratios to the base under vLLM's defaults.

    cd tests && ../.venv/bin/python -m benchmarks.gpu --size 1b --output gpu.json

Everything it needs it writes itself: a random Llama in bfloat16, its adapters as PEFT's files (for vLLM's LoRA) and as
programs (for deltas). First it runs the tests of the kernels and of the engine on the GPU. Then three engines are up at
once and alternate: vLLM as it comes; vLLM with its LoRA; deltas with CUDA graphs. Deltas without graphs, which are not
served with, are left to `--engines`.

`--smoke` does all of that on whatever device there is, so that the command itself is tried before a GPU is
rented.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.command import command, write_output
from benchmarks.gpu.engine_process import EngineProcess, EngineProcessError
from benchmarks.gpu.engines import ENGINES, Load
from benchmarks.gpu.inputs import SIZES, GPUInputs

SMOKE = {
    "size": "tiny",
    "sequences": 4,
    "prompt_tokens": 16,
    "new_tokens": 8,
    "repeats": 1,
    "kv_cache_gib": 0.25,
}
"""Defaults of a smoke test: minutes on two CPU cores."""

# What interprets kernels, or compiles them for other cards, takes minutes of a CPU and says nothing of this GPU.
CHOICE = ("-k", "gpu and not compiled")
TESTS = [Path(__file__).resolve().parents[2] / path for path in ("deltas/test_triton.py", "engine/test_gpu.py")]
"""What is run first: a wrong kernel has no speed."""
DEFAULT = [name for name in ENGINES if name != "deltas-eager"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command("benchmarks.gpu", __doc__, SIZES, "1b")
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=DEFAULT)
    parser.add_argument("--sequences", type=int, default=64, help="requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16, help="of every LoRA")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, after one that warms up; figures are medians")
    parser.add_argument("--kv-cache-gib", type=float, default=8.0, help="memory of every engine's KV cache")
    parser.add_argument("--skip-tests", action="store_true", help="measure without running the tests first")
    parser.add_argument("--smoke", action="store_true", help="a smoke test, on any device: its figures mean nothing")
    if parser.parse_args(arguments).smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args(arguments)


def refusal() -> str | None:
    """Returns why this machine cannot measure; None where it can."""
    if not torch.cuda.is_available():
        return (
            "no CUDA device: this measures a GPU. Run it on a machine with one, after `make install DEVICE=cuda`; "
            "on a CPU, `make bench` measures the CPU engine"
        )
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return "the installed vLLM is not its CUDA build: run `make install DEVICE=cuda`"
    return None


class Measured(NamedTuple):
    """Generated tokens per second of one workload by one engine, one figure per round."""

    engine: str
    workload: str
    figures: list[float]


def table(rows: list[Measured]) -> list[dict[str, Any]]:
    """Returns a row a workload: its median, and the median of its ratios to the base under vLLM's defaults in the same
    round, where that was run.
    """
    base = next((row.figures for row in rows if row.engine == "vllm" and row.workload == "base"), None)
    return [
        {
            "engine": row.engine,
            "workload": row.workload,
            "tokens_per_second": round(statistics.median(row.figures), 1),
            "of_base": base and round(statistics.median(f / b for f, b in zip(row.figures, base, strict=True)), 3),
        }
        for row in rows
    ]


def measure(processes: list[EngineProcess], repeats: int) -> list[Measured]:
    """Runs every workload of every engine once per round, one at a time, after a round that warms up."""
    measured = [Measured(process.name, workload, []) for process in processes for workload in process.workloads()]
    by_name = {process.name: process for process in processes}
    for repeat in range(repeats + 1):
        for row in measured:
            figure = by_name[row.engine].tokens_per_second(row.workload, repeat)
            if repeat:
                row.figures.append(figure)
    return measured


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts all engines, measures them alternately, and prints the table."""
    share = 0.9 / len(given.engines)
    load = Load(given.sequences, given.prompt_tokens, given.new_tokens, given.kv_cache_gib, share)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        inputs = GPUInputs.write(Path(folder), SIZES[given.size], given.rank)
        processes = [EngineProcess(name, inputs, load) for name in given.engines]
        for process in processes:
            stack.callback(process.close)
        rows = table(measure(processes, given.repeats))
    about = "; a smoke test, whose figures mean nothing" if given.smoke else ""
    print(f"{device_name()}, {given.size}, {given.sequences} sequences of {given.new_tokens} tokens{about}")
    print(f"{'engine':14}  {'workload':10}  {'tokens/s':>10}  {'of base':>7}")
    for row in rows:
        ratio = "" if row["of_base"] is None else f"{row['of_base']:7.3f}"
        print(f"{row['engine']:14}  {row['workload']:10}  {row['tokens_per_second']:10}  {ratio:>7}")
    return rows


def device_name() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name())


def main() -> int:
    given = parse()
    if not given.smoke and (problem := refusal()) is not None:
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return 2
    if not given.skip_tests:
        subprocess.run([sys.executable, "-m", "pytest", *map(str, TESTS), *CHOICE, "-q"], check=True)
    try:
        rows = compare(given)
    except EngineProcessError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 1
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    write_output(given.output, {"device": device_name(), "settings": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
