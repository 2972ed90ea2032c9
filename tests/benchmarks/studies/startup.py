"""From command to ready, and the memory it takes: `deltamux serve` and vLLM without deltamux.

    .venv/bin/python -m benchmarks.studies.startup --size mid --output startup.json     (in tests/)

Each start is a new process; the two sides alternate, after one start each that fills the caches of compiled code.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.command import command, write_output
from benchmarks.inputs import SIZES, write_base
from deltamux_testing.server_process import ServerProcess

LIMITS: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 512, "kv_cache_gib": 1, "max_num_seqs": 32}


@dataclass(frozen=True)
class Start:
    """One start.

    Attributes:
        seconds: from the command to the moment when requests can come.
        mebibytes: of all its processes then; what they share is counted once (PSS).
        processes: how many.
    """

    seconds: float
    mebibytes: int
    processes: int

    @classmethod
    def of(cls, seconds: float, pid: int) -> Start:
        root = psutil.Process(pid)
        all_of_them = [root, *root.children(recursive=True)]
        return cls(seconds, sum(p.memory_full_info().pss for p in all_of_them) >> 20, len(all_of_them))


def serve(model: Path, folder: Path, *, eager: bool) -> Start:
    flags = [text for name, value in LIMITS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    began = time.perf_counter()
    server = ServerProcess(model, folder / "store", *flags, eager=eager)
    try:
        return Start.of(time.perf_counter() - began, server.pid)
    finally:
        server.stop()


def plain(model: Path, *, eager: bool) -> Start:
    """Starts vLLM's AsyncLLM in a new process of this very module."""
    words = [sys.executable, "-m", "benchmarks.studies.startup", "--plain", str(model), *["--eager"] * eager]
    began = time.perf_counter()
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        if not any(line == "ready\n" for line in process.stdout):
            raise RuntimeError(f"vLLM did not start; run it to see why: {' '.join(words)}")
        return Start.of(time.perf_counter() - began, process.pid)
    finally:
        process.communicate()


def _be_plain(model: Path, *, eager: bool) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            dtype="bfloat16",
            max_model_len=LIMITS["max_model_len"],
            max_num_seqs=LIMITS["max_num_seqs"],
            kv_cache_memory_bytes=LIMITS["kv_cache_gib"] << 30,
            enforce_eager=eager,
            disable_log_stats=True,
        )
    )
    print("ready", flush=True)
    sys.stdin.read()
    llm.shutdown()


def measure(size: str, repeats: int, *, eager: bool) -> dict[str, list[Start]]:
    with tempfile.TemporaryDirectory(prefix="deltamux-startup-") as name:
        folder = Path(name)
        model = write_base(folder / "base", SIZES[size])
        sides: dict[str, Callable[[], Start]] = {
            "vLLM": lambda: plain(model, eager=eager),
            "deltamux serve": lambda: serve(model, folder, eager=eager),
        }
        starts: dict[str, list[Start]] = {side: [] for side in sides}
        for repeat in range(repeats + 1):
            for side, start in sides.items():
                made = start()
                if repeat:
                    starts[side].append(made)
        return starts


def show(starts: dict[str, list[Start]]) -> None:
    for side, made in starts.items():
        seconds = statistics.median(s.seconds for s in made)
        memory = statistics.median(s.mebibytes for s in made)
        print(f"{side:16} {seconds:6.1f} s to ready  {memory:7,.0f} MiB in {made[0].processes} processes")


def main() -> None:
    parser = command("benchmarks.studies.startup", __doc__, SIZES, "tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="leave the models uncompiled")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plain:
        _be_plain(given.plain, eager=given.eager)
        return
    starts = measure(given.size, given.repeats, eager=given.eager)
    show(starts)
    write_output(given.output, {side: [asdict(start) for start in made] for side, made in starts.items()})


if __name__ == "__main__":
    main()
