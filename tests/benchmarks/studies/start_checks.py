"""What share of an engine's start the comparison with the checkpoint and the warm-up steps take.

    python -m benchmarks.studies.start_checks --size mid --dtype float32 --output start_checks.json     (in tests/)

The comparison is the binding of all layers, with every probe; the worker measures it. The start is from the first
import of vLLM to the engine's readiness, in a process of its own for each repetition, as a server starts.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from vllm.config import VllmConfig

from benchmarks.command import command, machine, write_output
from benchmarks.inputs import SIZES, write_base
from benchmarks.studies import mixtures
from deltamux.engine.vllm.layers.binding import Binding
from deltamux.engine.vllm.worker.cpu import CPUDeltaWorker

TIMES = "DELTAMUX_STARTUP_TIMES"
"""The environment variable that names the folder for the times of the processes."""


class Start(NamedTuple):
    """Seconds of one start, and of two of its parts."""

    ready: float
    comparison: float
    warm_up: float

    @property
    def share(self) -> float:
        return (self.comparison + self.warm_up) / self.ready


def timed(function: Any, name: str) -> Any:
    """Returns the function, which writes its seconds to the folder of the times."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        (Path(os.environ[TIMES]) / name).write_text(str(time.perf_counter() - began))
        return result

    return call


class TimedWorker(CPUDeltaWorker):
    """A worker that writes how long the layers' binding takes."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        Binding.__init__ = timed(Binding.__init__, "comparison")  # type: ignore[method-assign]  # in this process alone
        super().load_model(*args, **kwargs)


def start(model: str, dtype: str, began: float) -> None:
    """Starts an engine in this process, and writes the seconds since `began` and those of its warm-up."""
    from deltamux.engine.base import EngineOptions
    from deltamux.engine.vllm.frontend import warmup
    from deltamux.engine.vllm.frontend.engine import VLLMEngine

    folder = Path(os.environ[TIMES])

    async def warm_up(engine: VLLMEngine, config: VllmConfig) -> None:
        began = time.perf_counter()
        await own(engine, config)
        (folder / "warm_up").write_text(str(time.perf_counter() - began))

    own, warmup.warm_up = warmup.warm_up, warm_up
    worker = f"{TimedWorker.__module__}.{TimedWorker.__qualname__}"

    async def run() -> None:
        options = EngineOptions(model, dtype=dtype, engine_arguments={"worker_cls": worker})
        engine = await asyncio.to_thread(VLLMEngine, options)
        await engine.start()
        (folder / "ready").write_text(str(time.time() - began))
        await engine.stop()

    asyncio.run(run())


def measure(model: Path, dtype: str) -> Start:
    program = "import sys; from benchmarks.studies.start_checks import start; start(*sys.argv[1:3], float(sys.argv[3]))"
    with tempfile.TemporaryDirectory() as folder:
        given = [sys.executable, "-c", program, str(model), dtype, str(time.time())]
        subprocess.run(given, env={**os.environ, TIMES: folder}, check=True, stdout=subprocess.DEVNULL)
        return Start(*(float((Path(folder) / name).read_text()) for name in Start._fields))


def main() -> int:
    parser = command("benchmarks.studies.start_checks", __doc__, SIZES, "mid")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    starts: dict[str, list[Start]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "llama": write_base(Path(folder) / "llama", SIZES[given.size]),
            "mixture": mixtures.write_base(Path(folder) / "mixture", mixtures.SIZES[given.size]),
        }
        for _ in range(1 + given.repeats):  # the first compiles
            for name, model in models.items():
                starts.setdefault(name, []).append(measure(model, given.dtype))
    print(f"{given.size} bases, {machine()}, {date.today()}: seconds; later starts are medians of {given.repeats}")
    for name, (first, *others) in starts.items():
        print(f"{name:8} first: {_text(first)}")
        print(f"{name:8} later: {_text(Start(*map(statistics.median, zip(*others, strict=True))))}")
    write_output(given.output, {name: [each._asdict() for each in all_] for name, all_ in starts.items()})
    return 0


def _text(start: Start) -> str:
    return (
        f"ready {start.ready:.1f}, of which comparison {start.comparison:.2f} and warm-up {start.warm_up:.2f}: "
        f"{start.share:.0%}"
    )


if __name__ == "__main__":
    sys.exit(main())
