"""Where the time of Zipf traffic goes: the base, prompts, adapters, loading into slots, and loads while steps run.

    python -m benchmarks.studies.zipf --size mid --output zipf.json     (in tests/)

Traffic over 5 adapters, over 2,000 that have not been requested yet (new), and the same once more (loaded), alternate
in one engine. Every other step leaves its adapters out, once they are in their slots: what adapters cost is the median
difference of steps that are milliseconds apart, so that a busy machine blurs the base's share alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.inputs import SIZES, Inputs, write_base
from benchmarks.parts import FEW, MANY, ZIPF_EXPONENT
from deltamux.bench import EngineSystem, Workload, drive
from deltamux.engine.base import EngineOptions, ProgramRef
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.engine.vllm.worker.cpu import CPUDeltaWorker

SEQUENCES = 32
FILES = 30
"""The 2,000 are as many programs to the engine, but share these files."""


class Step(NamedTuple):
    """One step of the engine; times are in seconds.

    Attributes:
        with_adapters: whether it applied them.
        rows: of requests; tokens: more where prompts are in it.
        adapters: with a row; arrived: those of them that had no slot before.
        arriving: what the manager took to begin it, arrivals included; model: what the worker took for the rest;
            between: from the model's end in the step before to this one: sampling, answers, and the next plan.
    """

    with_adapters: bool
    rows: int
    tokens: int
    adapters: int
    arrived: int
    arriving: float
    model: float
    between: float


class _RecordingRunnerMixin:
    lora_manager: Any
    step: tuple[Any, ...] | None = None
    with_adapters = False

    def set_active_loras(self, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        rows = len(num_scheduled_tokens)
        programs = set(input_batch.request_lora_mapping[:rows].tolist()) - {0}
        resident = set(self.lora_manager.resident()["device"])
        started = time.perf_counter()
        super().set_active_loras(input_batch, num_scheduled_tokens, *args, **kwargs)  # type: ignore[misc]  # the runner
        arriving = time.perf_counter() - started
        self.with_adapters = not self.with_adapters
        if not self.with_adapters:
            self.lora_manager.set_active_adapters(None, None)  # as vLLM has a step of the base
        counts = (rows, int(num_scheduled_tokens.sum()), len(programs), len(programs - resident))
        self.step = (self.with_adapters, *counts, arriving)


class RecordingWorker(CPUDeltaWorker):
    """A worker that notes its steps, and leaves the adapters out of every other one."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        runner.__class__ = type("RecordingRunner", (_RecordingRunnerMixin, type(runner)), {})
        self._steps: list[tuple[Any, ...]] = []
        self._ended = time.perf_counter()

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = super().execute_model(*args, **kwargs)
        step, self.model_runner.step = self.model_runner.step, None
        if step is not None:
            model = time.perf_counter() - started - step[-1]
            self._steps.append((*step, model, started - self._ended))
        self._ended = time.perf_counter()
        return output

    def recorded(self) -> list[tuple[Any, ...]]:
        """Returns the steps since the last call."""
        steps, self._steps = self._steps, []
        return steps


class Row(NamedTuple):
    """One kind of traffic: medians over rounds of the means over steps; times are in milliseconds a step.

    Attributes:
        base_ms: of a step that only decodes; it is longer where loads run at the same time.
        prompts_ms: what prompts add, spread over all steps: more where requests begin one by one.
    """

    traffic: str
    slots: int
    rows: float
    adapters: float
    arrived: float
    base_ms: float
    prompts_ms: float
    adapters_ms: float
    arriving_ms: float
    between_ms: float

    @property
    def ms_per_token(self) -> float:
        return (self.base_ms + self.prompts_ms + self.adapters_ms + self.arriving_ms + self.between_ms) / self.rows

    def floor_ms_per_token(self, base_ms: float) -> float:
        """Returns what a token takes at least: the base's work and the adapters' own, and nothing else."""
        return (base_ms + self.prompts_ms + self.adapters_ms) / self.rows


def account(traffic: str, slots: int, rounds: Sequence[list[Step]]) -> Row:
    """Returns the shares of the steps' time, of rounds of which each has steps with adapters and steps without."""
    # The pause before the first step of a round is that between two rounds.
    means = [_means(steps[1:]) for steps in rounds]
    differences = [d for steps in rounds for d in _differences(steps)]
    rows, adapters, arrived, *times = (statistics.median(column) for column in zip(*means, strict=True))
    base, prompts, arriving, between = (1e3 * seconds for seconds in times)
    own = 1e3 * statistics.median(differences)
    return Row(traffic, slots, rows, adapters, arrived, base, prompts, own, arriving, between)


def _means(steps: list[Step]) -> tuple[float, ...]:
    counts = zip(*((s.rows, s.adapters, s.arrived) for s in steps), strict=True)
    base = statistics.mean(s.model for s in steps if not s.with_adapters and s.tokens == s.rows)
    prompts = statistics.mean(s.model for s in steps if not s.with_adapters) - base
    rest = (statistics.mean(s.arriving for s in steps), statistics.mean(s.between for s in steps))
    return (*map(statistics.mean, counts), base, prompts, *rest)


def _differences(steps: list[Step]) -> Iterator[float]:
    """Yields by how much a step of decoding with adapters is longer than the next one without, of as many rows."""
    for a, b in pairwise(steps):
        if a.tokens == b.tokens == a.rows and a.with_adapters != b.with_adapters:
            yield b.model - a.model if b.with_adapters else a.model - b.model


async def measure(inputs: Inputs, slots: int, rounds: int) -> list[Row]:
    """Returns the rows of one engine: few, new and loaded."""
    options = EngineOptions(
        str(inputs.model),
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=SEQUENCES,
        max_active_adapters=slots,
        max_host_adapters=1000,
        kv_cache_gib=1.0,
        auto_merge=False,
        engine_arguments={"worker_cls": "benchmarks.studies.zipf.RecordingWorker"},
    )
    engine = VLLMEngine(options)
    await engine.start()
    base = Workload((), 8, 32, SEQUENCES, requests=4 * SEQUENCES, zipf=ZIPF_EXPONENT)
    names = tuple(f"adapter-{i}" for i in range(MANY))
    many, few = (replace(base, adapters=names[:count]) for count in (MANY, FEW))
    found: dict[str, list[list[Step]]] = {"few": [], "new": [], "loaded": []}
    try:
        for repeat in range(rounds + 1):
            fresh = EngineSystem(engine, _programs(inputs, names, repeat))
            found["few"].append(await _steps(EngineSystem(engine, _programs(inputs, names[:FEW], -1)), few, repeat))
            found["new"].append(await _steps(fresh, many, repeat))
            found["loaded"].append(await _steps(fresh, many, repeat))
    finally:
        await engine.stop()
    return [account(name, slots, counted[1:]) for name, counted in found.items()]


def _programs(inputs: Inputs, names: Sequence[str], repeat: int) -> Mapping[str, ProgramRef]:
    """Returns programs that are new to an engine in each round."""
    files = inputs.loras(FILES)
    return {n: ProgramRef(f"{n}-{repeat}", inputs.programs[files[i % FILES]].path) for i, n in enumerate(names)}


async def _steps(system: EngineSystem, load: Workload, repeat: int) -> list[Step]:
    assert isinstance(system.engine, VLLMEngine)
    await drive(system, load, str(repeat))
    [steps] = await system.engine.call_workers("recorded")
    assert isinstance(steps, list)
    return [Step(*step) for step in steps]


def show(rows: list[Row]) -> None:
    """Prints the shares, and each traffic's speed against that over few; the floor is base and adapters alone."""
    print(f"{'':14}  {'a step':^25}  {'milliseconds of it':^45}  against few")
    print("slots  traffic    rows  adapters  arrived    base  prompts  adapters  arriving  between  ratio  floor")
    for slots in dict.fromkeys(row.slots for row in rows):
        few, *many = (row for row in rows if row.slots == slots)
        for row in (few, *many):
            # Steps of as many rows have the same base: what differs there is the machine, or loads at the same time.
            base_ms = few.base_ms if row.rows > 0.9 * few.rows else min(each.base_ms for each in many)
            floor = few.floor_ms_per_token(few.base_ms) / row.floor_ms_per_token(base_ms)
            print(
                f"{slots:5}  {row.traffic:7}  {row.rows:6.1f}  {row.adapters:8.1f}  {row.arrived:7.2f}  "
                f"{row.base_ms:6.2f}  {row.prompts_ms:7.2f}  {row.adapters_ms:8.2f}  {row.arriving_ms:8.2f}  "
                f"{row.between_ms:7.2f}  {few.ms_per_token / row.ms_per_token:5.2f}  {floor:5.2f}"
            )


def main() -> int:
    summary = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(prog="benchmarks.studies.zipf", description=summary)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--slots", type=int, nargs="+", default=[SEQUENCES, 8])
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more warms up")
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs.build(write_base(Path(folder) / "base", SIZES[given.size]), Path(folder))
        for slots in given.slots:
            rows += asyncio.run(measure(inputs, slots, given.rounds))
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    print(f"{given.size} base, {machine}, {date.today()}: Zipf traffic over {FEW} and over {MANY} adapters")
    show(rows)
    if given.output:
        given.output.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
