"""What delta support costs traffic without adapters: our engine and plain vLLM, whose bursts of steps alternate.

    python -m benchmarks.studies.alternating_engines --size mid --output engines.json     (in tests/)

Engines are up at once, each in its own processes, and generate for the same traffic. A worker runs a burst of steps,
lets the next engine's run, and waits for the last one's end: so what is compared is fractions of a second apart,
where whole requests take many seconds, which differ on a busy machine by far more than what is looked for. Engines also
differ by where their memory lies. So they are started anew several times, and vLLM is up twice: the second shows how
much that is. What delta support itself costs, `benchmarks.studies.overhead` says more exactly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import select
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from vllm.v1.worker.cpu_worker import CPUWorker

from benchmarks.inputs import SIZES, write_base
from benchmarks.peers import VLLM
from benchmarks.running_systems import KV_CACHE_GIB, SLOTS
from benchmarks.steps import Row, row
from deltamux.bench import EngineSystem, System, Workload, drive
from deltamux.deltas import BaseModel
from deltamux.engine.base import EngineOptions
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.engine.vllm.worker.cpu import CPUDeltaWorker

SEQUENCES = 32
PROMPT_TOKENS = 8
PATIENCE_SECONDS = 5.0
"""After which another side has ended while it was its time to run."""


class Burst(NamedTuple):
    """Consecutive steps of one engine.

    Attributes:
        seconds: from the first step's start to that of the step after the last: what lies between steps counts.
        tokens: of the smallest step.
    """

    seconds: float
    tokens: int


class BurstSchedule:
    """One side of engines that run bursts alternately: it runs while it holds the byte that pipes pass on.

    Args:
        mine, following: named pipes, by which this side and the next one get the byte.
        steps: of a burst.
    """

    def __init__(self, mine: Path, following: Path, steps: int) -> None:
        # Opened to read and to write, neither waits for another side to open it too.
        self._mine, self._following = (os.open(path, os.O_RDWR) for path in (mine, following))
        self._steps = steps
        self._tokens: list[int] = []
        self._started = 0.0
        self.bursts: list[Burst] = []

    def begin(self, tokens: int) -> None:
        """Is called before every step, with the tokens that it computes; waits for the byte once a burst is over."""
        if len(self._tokens) == self._steps:
            self.bursts.append(Burst(time.perf_counter() - self._started, min(self._tokens)))
            os.write(self._following, b"x")
            self._tokens.clear()
        if not self._tokens:
            if select.select([self._mine], [], [], PATIENCE_SECONDS)[0]:
                os.read(self._mine, 1)
            self._started = time.perf_counter()
        self._tokens.append(tokens)

    def close(self) -> None:
        os.close(self._mine)
        os.close(self._following)


class AlternatingMixin:
    """A worker that runs bursts of steps alternately with others."""

    _schedule: BurstSchedule | None = None

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self._schedule is not None and scheduler_output.total_num_scheduled_tokens:
            self._schedule.begin(scheduler_output.total_num_scheduled_tokens)
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]  # vLLM's worker

    def begin_bursts(self, mine: str, following: str, steps: int) -> None:
        self._schedule = BurstSchedule(Path(mine), Path(following), steps)

    def end_bursts(self) -> list[list[float]]:
        assert self._schedule is not None
        schedule, self._schedule = self._schedule, None
        schedule.close()
        return [list(burst) for burst in schedule.bursts]


class PlainWorker(AlternatingMixin, CPUWorker):
    """vLLM's own worker, alternating."""


class DeltaWorker(AlternatingMixin, CPUDeltaWorker):
    """Our worker, alternating."""


class Side(NamedTuple):
    """An engine that is up."""

    system: System
    call_workers: Callable[[str, tuple[object, ...]], Awaitable[list[Any]]]


async def plain_vllm(stack: AsyncExitStack, model: Path, length: int) -> Side:
    arguments = {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": length,
        "max_num_seqs": SEQUENCES,
        "kv_cache_memory_bytes": int(KV_CACHE_GIB * 1024**3),
        "disable_log_stats": True,
        "worker_cls": "benchmarks.studies.alternating_engines.PlainWorker",
    }
    peer = VLLM(arguments, {}, BaseModel.from_pretrained(model).dims.vocab_size)
    await peer.start()
    stack.push_async_callback(peer.stop)
    return Side(peer, peer.call_workers)


async def deltamux(stack: AsyncExitStack, model: Path, length: int) -> Side:
    engine = VLLMEngine(
        EngineOptions(
            str(model),
            dtype="bfloat16",
            max_model_len=length,
            max_num_seqs=SEQUENCES,
            max_active_adapters=SLOTS,
            kv_cache_gib=KV_CACHE_GIB,
            engine_arguments={"worker_cls": "benchmarks.studies.alternating_engines.DeltaWorker"},
        )
    )
    await engine.start()
    stack.push_async_callback(engine.stop)
    return Side(EngineSystem(engine), engine.call_workers)


SIDES: dict[str, Callable[[AsyncExitStack, Path, int], Awaitable[Side]]] = {"vllm": plain_vllm, "deltamux": deltamux}


async def bursts(sides: Sequence[Side], folder: Path, tokens: int, steps: int, seed: str) -> list[list[Burst]]:
    """Generates with all at once, and returns each one's bursts."""
    pipes = [folder / f"pipe-{seed}-{i}" for i in range(len(sides))]
    for pipe in pipes:
        os.mkfifo(pipe)
    for side, mine, following in zip(sides, pipes, [*pipes[1:], pipes[0]], strict=True):
        await side.call_workers("begin_bursts", (str(mine), str(following), steps))
    first = os.open(pipes[0], os.O_RDWR)
    os.write(first, b"x")
    load = Workload(prompt_tokens=PROMPT_TOKENS, new_tokens=tokens, sequences=SEQUENCES)
    await asyncio.gather(*(drive(side.system, load, f"{seed} {i}") for i, side in enumerate(sides)))
    answers = [await side.call_workers("end_bursts", ()) for side in sides]
    os.close(first)
    return [[Burst(*burst) for burst in answer] for (answer,) in answers]


def pairs(reference: list[Burst], candidate: list[Burst], steps: int) -> list[tuple[float, float]]:
    """Returns seconds a step of bursts of one round in which every request generated."""
    return [
        (one.seconds / steps, other.seconds / steps)
        for one, other in zip(reference, candidate, strict=False)
        if one.tokens == other.tokens == SEQUENCES
    ]


Found = dict[tuple[str, int], list[tuple[float, float]]]
"""Pairs by candidate and length of bursts."""


async def start(model: Path, folder: Path, given: argparse.Namespace, number: int) -> Found:
    """Starts all engines, measures, and ends them."""
    names = given.sides
    found: Found = {(label, steps): [] for label in labels(names)[1:] for steps in given.steps}
    async with AsyncExitStack() as stack:
        up: dict[int, Side] = {}
        for i in range(number, number + len(names)):  # another one comes first each time
            place = i % len(names)
            up[place] = await SIDES[names[place]](stack, model, PROMPT_TOKENS + given.tokens)
        sides = [up[place] for place in range(len(names))]
        await bursts(sides, folder, 32, 4, f"warm-{number}")
        for repeat in range(given.repeats):
            for steps in given.steps:
                first, *others = await bursts(sides, folder, given.tokens, steps, f"{number}-{repeat}-{steps}")
                for label, other in zip(labels(names)[1:], others, strict=True):
                    found[label, steps] += pairs(first, other, steps)
    return found


def labels(names: Sequence[str]) -> list[str]:
    """Returns names that differ: what is there again is numbered."""
    return [name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


async def measure(model: Path, folder: Path, given: argparse.Namespace) -> list[Row]:
    every: Found = {}
    rows = []
    for number in range(given.starts):
        for (label, steps), found in (await start(model, folder, given, number)).items():
            every.setdefault((label, steps), []).extend(found)
            rows.append(row(f"{label}, by {steps}, start {number + 1}", found, "1.00"))
            print(shown(rows[-1]), flush=True)
    return rows + [row(f"{label}, by {steps}, all", found, "1.00") for (label, steps), found in every.items()]


def shown(each: Row) -> str:
    return (
        f"{each.workload:28}  {each.base_ms:8.2f}  {each.difference_ms:8.3f}  {each.ratio:6.3f}  "
        f"{each.low:.3f}-{each.high:.3f}"
    )


def main() -> int:
    summary = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(prog="benchmarks.studies.alternating_engines", description=summary)
    parser.add_argument("--size", choices=SIZES, default="mid")
    sides = ["vllm", "deltamux", "vllm"]
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=sides, help="the reference first")
    parser.add_argument("--steps", type=int, nargs="+", default=[1], help="of a burst")
    parser.add_argument("--tokens", type=int, default=400, help="generated by each of the 32 requests")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--starts", type=int, default=3, help="of all engines")
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args()
    print(f"{given.size} base, {os.cpu_count()} CPU cores ({platform.machine()}), {date.today()}: steps of 32 rows")
    print(
        f"{'side, steps of a burst':28}  {given.sides[0] + ' ms':>8}  {'more ms':>8}  {'ratio':>6}  {'95 %':>11}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = write_base(Path(folder) / "base", SIZES[given.size])
        rows = asyncio.run(measure(model, Path(folder), given))
    for each in rows[-len(given.steps) * (len(given.sides) - 1) :]:
        print(shown(each))
    if given.output:
        given.output.write_text(json.dumps([each._asdict() for each in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
