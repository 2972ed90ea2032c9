"""What a step costs with deltas, as a ratio to the same step without: one engine that alternates between the two.

    python -m benchmarks.steps --size mid --output steps.json     (in tests/)

Two engines side by side differ by some percent by where their memory lies, and by much more on a machine whose other
processes are busy. Here one engine generates for a batch of adapters, and every other step leaves them out: pairs of
steps are milliseconds apart, and their median difference is known to a fraction of a percent.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import command, machine, write_output
from benchmarks.inputs import SIZES, Inputs, write_base
from deltamux.bench.traffic import Workload
from deltamux.engine.base import EngineOptions, ProgramRef
from deltamux.engine.vllm.worker.cpu import CPUDeltaWorker

SEQUENCES = 32
PROMPT_TOKENS = 8
WARM_STEPS = 40
"""First steps, which are not counted: prompts, and what is built when it is first needed."""


class _AlternatingRunnerMixin:
    step = 0

    def set_active_loras(self, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        self.step += 1
        programs = input_batch.request_lora_mapping
        kept = programs.copy()
        if self.step % 2 and self.step > WARM_STEPS:
            programs[:] = 0
        super().set_active_loras(input_batch, num_scheduled_tokens, *args, **kwargs)  # type: ignore[misc]  # the runner
        programs[:] = kept


class AlternatingWorker(CPUDeltaWorker):
    """A worker that leaves the adapters out of every other step."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        runner.__class__ = type("AlternatingRunner", (_AlternatingRunnerMixin, type(runner)), {})

    def start_over(self) -> None:
        """Makes the next step the first."""
        self.model_runner.step = 0


class Row(NamedTuple):
    """One workload: medians over pairs of steps.

    Attributes:
        base_ms: of a step without adapters; difference_ms: by how much one with them is longer.
        low, high: the difference's interval of 95 % by resampling, as ratios.
        floor: share of the base's speed that is left if the adapters' own bytes, or operations, cost the base's price.
    """

    workload: str
    base_ms: float
    difference_ms: float
    ratio: float
    low: float
    high: float
    floor: str


def workloads(inputs: Inputs) -> dict[str, tuple[str | None, ...]]:
    made: dict[str, tuple[str | None, ...]] = {
        ("1 LoRA" if count == 1 else f"{count} LoRAs"): inputs.loras(count) for count in (1, 4, 16, 32)
    }
    made["ranks 4 to 64"] = inputs.ranks
    made |= {method: (method,) for method in ("ia3", "bitfit", "ln_tuning", "houlsby")}
    return made


class Engine:
    """vLLM's engine in this process, whose worker does something else in every other step.

    Args:
        programs: loaded before anything runs.
    """

    def __init__(
        self, model: Path, programs: Mapping[str, ProgramRef], tokens: int, worker: type, **options: Any
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.v1.engine.llm_engine import LLMEngine

        from deltamux.engine.vllm.frontend.config import engine_config

        arguments = EngineOptions(
            str(model),
            max_model_len=PROMPT_TOKENS + tokens,
            max_num_seqs=SEQUENCES,
            max_active_adapters=SEQUENCES,
            engine_arguments={"worker_cls": f"{worker.__module__}.{worker.__qualname__}", "async_scheduling": False},
            **options,
        )
        self.llm = LLMEngine.from_vllm_config(engine_config(arguments))
        self._ids = {name: number for number, name in enumerate(programs, start=1)}
        self._tokens = tokens
        for name, number in self._ids.items():
            self.llm.collective_rpc("delta_load", args=(number, str(programs[name].path), ""))
            while (status := self.llm.collective_rpc("delta_status", args=(number,))[0]) == "loading":
                time.sleep(0.01)
            assert status == "ready", status

    def prepare(self, step: int) -> None:
        """Is called before a step, numbered from 1, outside of its time."""

    def step_times(self, adapters: tuple[str | None, ...]) -> list[float]:
        """Returns the seconds of each step in which every request generates a token; odd ones had no adapters."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest

        self.llm.collective_rpc("start_over")
        sampling = SamplingParams(temperature=0.0, max_tokens=self._tokens, ignore_eos=True)
        for i in range(SEQUENCES):
            name = adapters[i % len(adapters)]
            prompt = TokensPrompt(prompt_token_ids=[3 + (7919 * i + 31 * k) % 8000 for k in range(PROMPT_TOKENS)])
            lora = LoRARequest(name, self._ids[name], "program") if name else None
            self.llm.add_request(f"{name}-{i}-{time.monotonic_ns()}", prompt, sampling, lora_request=lora)
        times: list[float] = []
        while self.llm.has_unfinished_requests():
            self.prepare(len(times) + 1)
            started = time.perf_counter()
            self.llm.step()
            times.append(time.perf_counter() - started)
        return times[WARM_STEPS : self._tokens - 1]


def row(workload: str, pairs: list[tuple[float, float]], floor: str) -> Row:
    """Returns the medians of pairs (seconds without adapters, seconds with them)."""
    import numpy as np

    both = np.array(pairs)
    base, differences = float(np.median(both[:, 0])), both[:, 1] - both[:, 0]
    drawn = np.random.default_rng(0).choice(differences, (1000, len(differences)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.975, 0.025])
    middle = statistics.median(differences.tolist())
    ratio, least, most = (base / (base + float(difference)) for difference in (middle, low, high))
    return Row(workload, base * 1e3, middle * 1e3, ratio, least, most, floor)


def measure(inputs: Inputs, tokens: int, repeats: int, dtype: str) -> list[Row]:
    engine = Engine(inputs.model, inputs.programs, tokens, AlternatingWorker, dtype=dtype, auto_merge=False)
    loads = workloads(inputs)
    pairs = step_pairs(engine, loads, repeats)
    return [
        row(name, pairs[name], str(inputs.floor(Workload(adapters, new_tokens=tokens, sequences=SEQUENCES))))
        for name, adapters in loads.items()
    ]


def step_pairs(
    engine: Engine, loads: Mapping[str, tuple[str | None, ...]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Returns each workload's pairs of steps: seconds without adapters, seconds with them."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in loads}
    for _ in range(repeats):
        for name, adapters in loads.items():
            times = engine.step_times(adapters)
            # The first that is counted is step WARM_STEPS + 1 of the worker, an odd one: without adapters.
            pairs[name] += zip(times[::2], times[1::2], strict=False)
    return pairs


def print_rows(rows: list[Row]) -> None:
    print(f"{'workload':24}  {'base ms':>8}  {'more ms':>8}  {'ratio':>6}  {'95 %':>12}  floor")
    for each in rows:
        spread = f"{each.low:.3f}-{each.high:.3f}"
        print(
            f"{each.workload:24}  {each.base_ms:8.2f}  {each.difference_ms:8.3f}  {each.ratio:6.3f}  {spread:>12}  "
            f"{each.floor}"
        )


def parse(
    module: str, about: str | None, repeats: int, sizes: Iterable[str] = SIZES, tokens: int = 400
) -> argparse.Namespace:
    """Returns the options of a command that measures steps."""
    parser = command(module, about, sizes, "mid")
    parser.add_argument("--tokens", type=int, default=tokens, help="generated by each of the 32 requests")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--dtype", default="bfloat16", help="slow on a CPU without instructions for it (AVX2 alone)")
    return parser.parse_args()


def main() -> int:
    given = parse("benchmarks.steps", __doc__, repeats=2)
    with tempfile.TemporaryDirectory() as folder:
        model = write_base(Path(folder) / "base", SIZES[given.size])
        rows = measure(Inputs.build(model, Path(folder)), given.tokens, given.repeats, given.dtype)
    print(f"{given.size} base, {machine()}, {date.today()}: steps of 32 rows")
    print_rows(rows)
    write_output(given.output, [each._asdict() for each in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
