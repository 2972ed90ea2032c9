"""How adapters scale past the device slots and past host memory, as ratios within one run.

    .venv/bin/python -m benchmarks.tiers --size tiny --output tiers.json     (in tests/)

* many: throughput of power-law requests over 2,000 registered adapters, against the same over 5.
* slots: median time to first token of 16 adapters over 8 slots, against 16 over 16.
* cold: what the first token of an adapter on disk takes beyond a resident one's, while others decode.

Machines are noisy: only the ratios mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engine.worlds import saved

from benchmarks.throughput import SIZES, write_base
from deltamux.deltas import BaseModel, LowRank, Program
from deltamux.engine.base import EngineOptions, ProgramRef, SamplingOptions
from deltamux.engine.vllm.engine import VLLMEngine

SEQUENCES = 32
FILES = 40
"""Distinct files; further adapters are links to these, under names of their own."""


class Sample(NamedTuple):
    """Attributes: first: seconds to the first token; tokens: how many came."""

    first: float
    tokens: int


class Bench:
    """One base and its adapters' files.

    Args:
        directory: holds all of it.
        size: see SIZES.
        count: adapters registered.
    """

    def __init__(self, directory: Path, size: str, count: int) -> None:
        self.base = write_base(directory / "base", SIZES[size])
        model = BaseModel.from_pretrained(self.base)
        files = [saved(_lora(model), directory, f"file-{i}") for i in range(FILES)]
        self.refs = [_linked(directory, files[i % FILES], f"adapter-{i}") for i in range(count)]

    @asynccontextmanager
    async def engine(self, slots: int, host: int = 1000) -> AsyncIterator[VLLMEngine]:
        options = EngineOptions(
            str(self.base), dtype="bfloat16", max_model_len=512, kv_cache_gib=1, max_active_adapters=slots,
            max_host_adapters=host, max_num_seqs=SEQUENCES,
        )  # fmt: skip
        engine = VLLMEngine(options)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()


def _lora(base: BaseModel) -> Program:
    shapes = ((s.name, s.in_features, s.out_features) for s in base.linears)
    return Program.of((n, LowRank(0.02 * torch.randn(8, i), 0.02 * torch.randn(o, 8))) for n, i, o in shapes)


def _linked(directory: Path, ref: ProgramRef, name: str) -> ProgramRef:
    path = directory / f"{name}.safetensors"
    path.hardlink_to(ref.path)
    return ProgramRef(name, path)


async def one(engine: VLLMEngine, ref: ProgramRef | None, tag: str, tokens: int) -> Sample:
    sampling = SamplingOptions(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    prompt = tuple(hash((tag, k)) % 8000 for k in range(8))
    started, first, count = time.perf_counter(), 0.0, 0
    async for chunk in engine.generate(prompt, sampling, ref, request_id=tag):
        first = first or time.perf_counter() - started
        count += len(chunk.token_ids)
    return Sample(first, count)


async def crowd(engine: VLLMEngine, refs: Sequence[ProgramRef], tag: str, tokens: int) -> tuple[float, list[Sample]]:
    """Serves the requests in order, SEQUENCES at a time; returns tokens a second, and every request's sample."""
    queue = list(enumerate(refs))[::-1]
    samples: list[Sample] = []

    async def worker() -> None:
        while queue:
            i, ref = queue.pop()
            samples.append(await one(engine, ref, f"{tag}-{i}", tokens))

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(SEQUENCES)))
    return sum(s.tokens for s in samples) / (time.perf_counter() - started), samples


def power_law(refs: Sequence[ProgramRef], count: int, seed: int, alpha: float = 1.0) -> list[ProgramRef]:
    """Draws requests over all adapters: the i-th of them with a weight of i^-alpha."""
    return random.Random(seed).choices(refs, [(i + 1) ** -alpha for i in range(len(refs))], k=count)


async def many(bench: Bench, slots: int, repeats: int, requests: int) -> dict[str, Any]:
    few, all_of_them = [], []
    async with bench.engine(slots) as engine:
        for r in range(repeats + 1):
            pair = [
                (await crowd(engine, power_law(refs, requests, r), f"{len(refs)}-{r}", 32))[0]
                for refs in (bench.refs[:5], bench.refs)
            ]
            if r:  # the first round warms up
                few.append(pair[0])
                all_of_them.append(pair[1])
    ratio = statistics.median(b / a for a, b in zip(few, all_of_them, strict=True))
    return {"slots": slots, "few": few, "many": all_of_them, "adapters": len(bench.refs), "ratio": ratio}


async def slots(bench: Bench, repeats: int) -> dict[str, Any]:
    figures: dict[int, dict[str, float]] = {}
    for number in (16, 8):
        async with bench.engine(number) as engine:
            firsts, rates = [], []
            for r in range(repeats + 1):
                order = [bench.refs[i % 16] for i in range(2 * SEQUENCES)]
                rate, samples = await crowd(engine, order, f"{number}-{r}", 48)
                if r:
                    firsts += [s.first for s in samples]
                    rates.append(rate)
        figures[number] = {"ttft": statistics.median(firsts), "tokens_per_second": statistics.median(rates)}
    return {
        "16": figures[16],
        "8": figures[8],
        "ttft_ratio": figures[8]["ttft"] / figures[16]["ttft"],
        "throughput_ratio": figures[8]["tokens_per_second"] / figures[16]["tokens_per_second"],
    }


async def cold(bench: Bench, repeats: int) -> dict[str, Any]:
    """Needs files of its own: dropping a file's pages drops them for all of its names."""
    async with bench.engine(8) as engine:
        await one(engine, bench.refs[0], "start", 8)
        noise = [asyncio.create_task(one(engine, bench.refs[0], f"noise-{i}", 400)) for i in range(8)]
        colds, warms, reads = [], [], []
        for r in range(repeats):
            ref, other = bench.refs[1 + 2 * r], bench.refs[2 + 2 * r]
            _drop_pages(ref.path)
            _drop_pages(other.path)
            started = time.perf_counter()
            other.path.read_bytes()
            reads.append(time.perf_counter() - started)
            colds.append((await one(engine, ref, f"cold-{r}", 2)).first)
            warms.append((await one(engine, ref, f"warm-{r}", 2)).first)
        busy = sum(not task.done() for task in noise)
        await asyncio.gather(*noise)
    beyond = [c - w - d for c, w, d in zip(colds, warms, reads, strict=True)]
    return {
        "cold": statistics.median(colds),
        "warm": statistics.median(warms),
        "read": statistics.median(reads),
        "still_decoding": busy,
        "beyond_ms": 1000 * statistics.median(beyond),
    }


def _drop_pages(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


async def measure(size: str, parts: Sequence[str], repeats: int, requests: int, adapters: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"size": size}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), size, adapters)
        if "many" in parts:
            figures["many"] = await many(bench, SEQUENCES, repeats, requests)
        if "few-slots" in parts:
            figures["many over few slots"] = await many(bench, 8, repeats, requests)
        if "slots" in parts:
            figures["slots"] = await slots(bench, repeats)
        if "cold" in parts:
            figures["cold"] = await cold(bench, 12)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--parts", nargs="+", default=["many", "slots", "cold"], help="also: few-slots")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=192, help="requests a round of power-law traffic")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args()
    figures = asyncio.run(measure(given.size, given.parts, given.repeats, given.requests, given.adapters))
    print(json.dumps(figures, indent=2))
    if given.output:
        given.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
