"""Throughput on a GPU: the base, vLLM's own LoRA, and deltas, as ratios to the base under vLLM's defaults.

    cd tests && ../.venv/bin/python -m benchmarks.gpu --size 1b --output gpu.json

Everything it needs it writes itself: a random Llama in bfloat16, its adapters as PEFT's files (for vLLM's LoRA) and as
programs (for deltas). First it runs the tests of the kernels and of the engine on the GPU. Then come four
engines, one after the other: vLLM as it comes; vLLM with its LoRA; deltas eagerly; deltas with CUDA graphs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engines import ENGINES, Load, Measured
from benchmarks.gpu.material import SIZES, Material

TESTS = [Path(__file__).resolve().parents[2] / path for path in ("deltas/test_triton.py", "engine/test_gpu.py")]
"""What is run first: a wrong kernel has no speed."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the random base")
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=list(ENGINES))
    parser.add_argument("--sequences", type=int, default=64, help="requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16, help="of every LoRA")
    parser.add_argument(
        "--repeats", type=int, default=3, help="after one round that warms up; the figure is the median"
    )
    parser.add_argument("--kv-cache-gib", type=float, default=8.0, help="memory of every engine's KV cache")
    parser.add_argument("--skip-tests", action="store_true", help="measure without running the tests first")
    parser.add_argument("--output", type=Path, help="JSON file")
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


def table(rows: list[Measured]) -> list[dict[str, Any]]:
    """Returns a row a workload, with its median and its ratio to the base under vLLM's defaults, where that was run."""
    base = next((statistics.median(row.figures) for row in rows if row.engine == "vllm"), None)
    return [
        {
            "engine": row.engine,
            "workload": row.workload,
            "tokens_per_second": round(statistics.median(row.figures), 1),
            "of_base": None if base is None else round(statistics.median(row.figures) / base, 3),
        }
        for row in rows
    ]


async def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one engine after the other, and prints the rows of each as soon as it has them."""
    load = Load(given.sequences, given.prompt_tokens, given.new_tokens, given.repeats, given.kv_cache_gib)
    print(f"{torch.cuda.get_device_name()}, {given.size}, {given.sequences} sequences of {given.new_tokens} tokens")
    print(f"{'engine':14}  {'workload':10}  {'tokens/s':>10}  {'of base':>7}", flush=True)
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        material = Material.write(Path(folder), SIZES[given.size], given.rank)
        for name in given.engines:
            before = len(measured)
            measured += await ENGINES[name](material, load)
            for row in table(measured)[before:]:
                ratio = "" if row["of_base"] is None else f"{row['of_base']:7.3f}"
                print(
                    f"{row['engine']:14}  {row['workload']:10}  {row['tokens_per_second']:10}  {ratio:>7}", flush=True
                )
    return table(measured)


def main() -> int:
    given = parse()
    if (problem := refusal()) is not None:
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return 2
    # Asking for the device, above, leaves no process that can be forked.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if not given.skip_tests:
        subprocess.run([sys.executable, "-m", "pytest", *map(str, TESTS), "-q"], check=True)
    rows = asyncio.run(measure(given))
    if given.output:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
        result = {"device": torch.cuda.get_device_name(), "settings": settings, "rows": rows}
        given.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
