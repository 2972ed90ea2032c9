"""The parts of the suite: each is one comparison, or a few that share a reference."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.inputs import METHODS, NUM_LORAS, Inputs
from benchmarks.other_load import OtherLoad
from benchmarks.results import BEYOND_WARM, FIRST_TOKEN, GAP, RATE, Row, row
from benchmarks.running_systems import PEFT_LORAS, RunningSystems, served_name
from deltamux.bench import Candidate, Comparison, EngineSystem, Measurement, System, Workload, drive, interleave
from deltamux.bench.floor import Floor
from deltamux.client import AsyncClient
from deltamux.engine.base import ProgramRef

LONG = 256
MANY, FEW = 2000, 5
ZIPF_EXPONENT = 1.0
SETTLE_SECONDS = 1.3
COLD_ALLOWANCE_MS = 50.0
COLD_STARTS = 8
CHANGE_SECONDS = 0.5
OTHERS = 8
"""Requests that decode while a cold adapter is asked for."""


@dataclass(frozen=True)
class Bench:
    """One run of the suite.

    Attributes:
        size: tiny, mid or the name of a model's directory.
        other_load: watch over all that is measured.
    """

    size: str
    systems: RunningSystems
    tokens: int
    repeats: int
    say: Callable[[str], None]
    other_load: OtherLoad = field(default_factory=OtherLoad)

    @property
    def inputs(self) -> Inputs:
        return self.systems.inputs

    def load(self, *adapters: str | None, prompt: int = 8) -> Workload:
        """Returns the usual workload: every sequence once, all of them at the same time."""
        return Workload(adapters or (None,), prompt, self.tokens, self.systems.sequences)

    def candidate(self, part: str, name: str, system: System, load: Workload) -> Candidate:
        return Candidate(name, lambda seed: drive(system, load, f"{part} {seed}"))

    def settled(
        self, part: str, name: str, ours: EngineSystem, load: Workload, resident: tuple[str, ...] = ()
    ) -> Candidate:
        """Returns a candidate whose engine holds its own adapters alone, or the given ones, before its time starts."""
        held = frozenset(resident or (a for a in load.adapters if a is not None))

        async def run(seed: str) -> Measurement:
            await self.systems.settle(ours, held)
            return await drive(ours, load, f"{part} {seed}")

        return Candidate(name, run)

    async def compare(self, part: str, reference: Candidate, *candidates: Candidate) -> list[Comparison]:
        with self.other_load.watched():
            return await interleave(
                reference,
                candidates,
                self.repeats,
                lambda text: self.say(f"{part}: {text}"),
                settle_seconds=SETTLE_SECONDS if self.systems.is_shared else 0.0,
            )

    async def rows(
        self,
        part: str,
        against: str,
        reference: Candidate,
        *candidates: Candidate,
        metrics: Sequence[str] = (RATE,),
        floors: Mapping[str, Floor] | None = None,
    ) -> list[Row]:
        compared = await self.compare(part, reference, *candidates)
        known = floors or {}
        return [row(part, c, against, metric, known.get(c.name), self.size) for c in compared for metric in metrics]

    async def against_base(self, part: str, loads: Mapping[str, Workload], *more: Candidate) -> list[Row]:
        """Compares workloads of one prompt length with the base's on the same engine."""
        ours = await self.systems.ours()
        first = next(iter(loads.values()))
        base = self.candidate(part, "base", ours, replace(first, adapters=(None,)))
        floors = {name: self.inputs.floor(load) for name, load in loads.items()}
        own = (self.settled(part, name, ours, load) for name, load in loads.items())
        return await self.rows(part, "base", base, *own, *more, floors=floors)


async def loras(bench: Bench) -> list[Row]:
    """LoRA of rank 8 on all linear layers, 1 to 32 adapters in a batch, and eight of ranks 4 to 64.

    Every workload finds its own adapters alone in the engine, but for one: 16 of 32 that are there.
    """
    part, names = "loras", {1: "1 LoRA", 4: "4 LoRAs", 16: "16 LoRAs", 32: "32 LoRAs"}
    loads = {name: bench.load(*bench.inputs.loras(count)) for count, name in names.items()}
    loads["ranks 4 to 64"] = bench.load(*bench.inputs.ranks)
    of_more = bench.settled(
        part, "16 LoRAs of 32", await bench.systems.ours(), loads["16 LoRAs"], resident=bench.inputs.loras(NUM_LORAS)
    )
    return await bench.against_base(part, loads, of_more)


async def methods(bench: Bench) -> list[Row]:
    """Every other method alone, and all of them with four LoRAs and the base in one batch."""
    loads = {name: bench.load(name) for name in METHODS}
    return await bench.against_base("methods", {**loads, "all mixed": bench.load(*bench.inputs.mixed)})


async def long(bench: Bench) -> list[Row]:
    """Prompts of 256 tokens, where reading them is most of the work."""
    loads = {
        "16 LoRAs": bench.load(*bench.inputs.loras(16), prompt=LONG),
        "all mixed": bench.load(*bench.inputs.mixed, prompt=LONG),
    }
    return await bench.against_base("long", loads)


async def plain(bench: Bench) -> list[Row]:
    """Base traffic on our engine against vLLM without deltamux, compiled as vLLM does by default."""
    part, load = "plain", bench.load()
    reference = bench.candidate(part, "vLLM", await bench.systems.vllm(loras=False), load)
    return await bench.rows(part, "vLLM", reference, bench.candidate(part, "base", await bench.systems.ours(), load))


async def vllm_lora(bench: Bench) -> list[Row]:
    """16 LoRAs against vLLM's own multi-LoRA with the same files, prompts of 8 and of 256 tokens.

    The base against it is the bound: what a server would reach whose adapters cost nothing.
    """
    part, rows = "vllm-lora", []
    ours, theirs = await bench.systems.ours(), await bench.systems.vllm(loras=True)
    for prompt in (8, LONG):
        load = bench.load(*bench.inputs.loras(PEFT_LORAS), prompt=prompt)
        reference = bench.candidate(part, "vLLM's LoRA", theirs, load)
        own = bench.settled(part, f"16 LoRAs, prompt {prompt}", ours, load)
        bound = bench.candidate(part, f"base, prompt {prompt}", ours, replace(load, adapters=(None,)))
        rows += await bench.rows(part, "vLLM's LoRA", reference, own, bound)
    return rows


async def peft(bench: Bench) -> list[Row]:
    """16 LoRAs against PEFT's `adapter_names` in one batch, on one core (our worker's share) and on all."""
    part, rows = "peft", []
    load = bench.load(*bench.inputs.loras(PEFT_LORAS))
    ours, theirs = await bench.systems.ours(), bench.systems.peft()
    for threads, label in {1: "1 thread", os.cpu_count() or 1: "all threads"}.items():
        run = partial(theirs.run, load, threads)
        own = bench.settled(part, f"16 LoRAs, {label}", ours, load)
        rows += await bench.rows(part, f"PEFT, {label}", Candidate("PEFT", run), own)
    return rows


async def zipf(bench: Bench) -> list[Row]:
    """Zipf traffic over 2,000 adapters against the same over 5, with few slots and with one for every sequence.

    The 2,000 are as many programs to the engine, each loaded and evicted for itself, but share the files of 30. Most of
    them are asked for the first time: their loads are part of what is measured.
    """
    part, rows = "zipf", []
    loras = bench.inputs.loras(FEW * 6)
    programs = {
        f"z{i}": ProgramRef(f"zipf-{i}", bench.inputs.programs[loras[i % len(loras)]].path) for i in range(MANY)
    }
    half = max(1, bench.tokens // 2)
    base = Workload((), 8, half, bench.systems.sequences, requests=4 * bench.systems.sequences, zipf=ZIPF_EXPONENT)
    many, few = (replace(base, adapters=tuple(programs)[:count]) for count in (MANY, FEW))
    for slots in (8, bench.systems.sequences):
        ours = await bench.systems.ours(slots, programs)
        reference = bench.candidate(part, "few", ours, few)
        own = bench.candidate(part, f"{MANY} adapters, {slots} slots", ours, many)
        floors = {own.name: _zipf_floor(bench, many, few, slots)}
        rows += await bench.rows(part, f"{FEW} adapters", reference, own, floors=floors)
    return rows


def _zipf_floor(bench: Bench, many: Workload, few: Workload, slots: int) -> Floor:
    """Returns the floor of many adapters over that of few: a batch reads more of them.

    Where a batch has more adapters than there are slots, each step is for a part of its rows, and reads the base anew.
    """
    floors = []
    for load in (many, few):
        names = [request.adapter for request in replace(load, requests=many.num_requests * 8).traffic("floor", 2)]
        batches = [names[i : i + load.sequences] for i in range(0, len(names), load.sequences)]
        distinct = statistics.mean(len(set(batch)) for batch in batches)
        resident = bench.inputs.floor(bench.load(*bench.inputs.loras(min(round(distinct), slots, NUM_LORAS))))
        floors.append((resident.bytes * min(1.0, slots / distinct), resident.operations))
    (own_bytes, own_operations), (few_bytes, few_operations) = floors
    return Floor(own_bytes / few_bytes, own_operations / few_operations)


async def slots(bench: Bench) -> list[Row]:
    """16 LoRAs over 8 slots against 16 over 16: the median time to the first token, four requests a caller."""
    part = "slots"
    load = replace(bench.load(*bench.inputs.loras(16)), requests=4 * bench.systems.sequences)
    reference = bench.candidate(part, "16 slots", await bench.systems.ours(16), load)
    own = bench.candidate(part, "16 LoRAs, 8 slots", await bench.systems.ours(8), load)
    return await bench.rows(part, "16 slots", reference, own, metrics=(FIRST_TOKEN,))


async def grpc(bench: Bench) -> list[Row]:
    """Streaming through a server process and our client against the same engine in this process."""
    part, rows = "grpc", []
    ours, server = await bench.systems.ours(), await bench.systems.server()
    for name, adapters in {"base": (None,), "16 LoRAs": bench.inputs.loras(PEFT_LORAS)}.items():
        load = bench.load(*adapters)
        served = replace(load, adapters=tuple(served_name(a) if a is not None else None for a in adapters))
        reference = bench.candidate(part, "in process", ours, load)
        rows += await bench.rows(part, "in process", reference, bench.candidate(part, name, server, served))
    return rows


async def swap(bench: Bench) -> list[Row]:
    """16 LoRAs over gRPC while others are uploaded, made live and deleted, against the same traffic left alone."""
    part, server = "swap", await bench.systems.server()
    load = bench.load(*map(served_name, bench.inputs.loras(PEFT_LORAS)))
    load = replace(load, requests=4 * load.sequences)
    others = [bench.inputs.directories[name] for name in bench.inputs.loras(NUM_LORAS)[PEFT_LORAS:]]

    async def during_changes(seed: str) -> Measurement:
        async with _changing(server.client, others):
            return await drive(server, load, f"{part} {seed}")

    reference = bench.candidate(part, "left alone", server, load)
    own = Candidate("16 LoRAs during uploads", during_changes)
    return await bench.rows(part, reference.name, reference, own, metrics=(RATE, GAP))


@asynccontextmanager
async def _changing(client: AsyncClient, directories: Sequence[Path]) -> AsyncIterator[None]:
    """Uploads adapters one after the other, each as the live version of one name, and deletes each after a while."""

    async def again_and_again() -> None:
        for directory in itertools.cycle(directories):
            await client.upload_adapter(served_name("moving"), directory, promote=True)
            await asyncio.sleep(CHANGE_SECONDS)
            await client.delete_adapter(served_name("moving"))

    async with _until_left(again_and_again()):
        yield


async def cold(bench: Bench) -> list[Row]:
    """The first token of an adapter never asked for, its file out of the page cache, beyond a warm one's.

    Once alone, and once while others decode: what is loaded must not hold them up, nor they it.
    """
    return [await _cold_starts(bench, others) for others in (0, OTHERS)]


async def _cold_starts(bench: Bench, others: int) -> Row:
    source = bench.inputs.programs["lora-0"]
    programs = {f"c{i}": _copy(source, bench.inputs.folder / "cold", f"{others}-{i}") for i in range(COLD_STARTS + 1)}
    ours = await bench.systems.ours(programs=programs)
    once = Workload((), 8, min(4, bench.tokens), sequences=1)
    cold_ms, warm_ms = [], []
    async with _decoding(ours, others):
        for number, name in enumerate(programs):
            bench.say(f"cold: start {number} of {COLD_STARTS} with {others} others")
            forget(programs[name].path)
            load = replace(once, adapters=(name,))
            first, again = [await drive(ours, load, f"cold {others} {number} {repeat}") for repeat in ("cold", "warm")]
            if number:  # the first one warms the engine up
                cold_ms.append(1000 * first.median_first_token)
                warm_ms.append(1000 * again.median_first_token)
            await ours.engine.evict(programs[name].digest)
    name = f"1 LoRA with {others} others" if others else "1 LoRA"
    return _cold_row(name, source.path, cold_ms, warm_ms)


@asynccontextmanager
async def _decoding(ours: EngineSystem, others: int) -> AsyncIterator[None]:
    """Keeps so many requests for the base under way."""

    async def again_and_again(number: int) -> None:
        for repeat in itertools.count():
            await drive(ours, Workload(sequences=1), f"other {number} {repeat}")

    async with _until_left(*(again_and_again(number) for number in range(others))):
        yield


@asynccontextmanager
async def _until_left(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs work while the block runs, and ends it with the block; its failure fails the block."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        done = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _cold_row(name: str, file: Path, cold_ms: Sequence[float], warm_ms: Sequence[float]) -> Row:
    megabytes, rate = file.stat().st_size / 1e6, disk_rate(file) / 1e6
    beyond = [c - w for c, w in zip(cold_ms, warm_ms, strict=True)]
    return Row(
        "cold",
        name,
        f"warm; {megabytes:.1f} MB at {rate:,.0f} MB/s",
        BEYOND_WARM,
        own=round(statistics.median(cold_ms), 1),
        reference=round(statistics.median(warm_ms), 1),
        value=round(statistics.median(beyond), 1),
        low=round(min(beyond), 1),
        high=round(max(beyond), 1),
        target=round(COLD_ALLOWANCE_MS + 1000 * megabytes / rate, 1),
    )


def _copy(source: ProgramRef, folder: Path, name: str) -> ProgramRef:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.safetensors"
    shutil.copyfile(source.path, path)
    return ProgramRef(f"cold-{name}", path)


def forget(path: Path) -> None:
    """Writes a file through to the disk, and drops it from the page cache."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def disk_rate(path: Path) -> float:
    """Returns bytes a second of reading a file that is not in the page cache, the median of five."""
    rates = []
    for _ in range(5):
        forget(path)
        started = time.perf_counter()
        path.read_bytes()
        rates.append(path.stat().st_size / (time.perf_counter() - started))
    return statistics.median(rates)


PackedSlice = Callable[[Bench], Awaitable[list[Row]]]
PARTS: dict[str, PackedSlice] = {
    "loras": loras,
    "methods": methods,
    "long": long,
    "cold": cold,
    "plain": plain,
    "vllm-lora": vllm_lora,
    "peft": peft,
    "grpc": grpc,
    "swap": swap,
    "slots": slots,
    "zipf": zipf,
}
"""In this order, parts that share an engine follow each other."""
