"""What the way over gRPC costs: the same requests to vLLM and to our engine in this process, and to a server.

    .venv/bin/python -m benchmarks.studies.grpc_path --size mid --output grpc.json     (in tests/)

The server is a real `deltamux serve`, its client a process of its own; the engine in this process has the same
arguments. One of the two is idle while the other works. Ways alternate, --repeats times; the figure is the median.
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
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.inputs import SIZES, write_base
from benchmarks.studies.grpc_load import Figures, LoadRequest
from deltamux.engine.base import EngineOptions, SamplingOptions
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux_testing.server_process import ServerProcess

PROMPT_TOKENS = 8
NEW_TOKENS = 64
SETTLE_SECONDS = 1.3
LIMITS: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 512, "kv_cache_gib": 1, "max_num_seqs": 32}
Way = Callable[[LoadRequest], Awaitable[Figures]]


class LoadProcess:
    """The client's process."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.studies.grpc_load", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def run(self, wanted: LoadRequest) -> Figures:
        return await asyncio.to_thread(self._ask, wanted)

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, wanted: LoadRequest) -> Figures:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(wanted._asdict()), file=self._process.stdin, flush=True)
        return Figures(*json.loads(self._process.stdout.readline()))


async def in_process(answers: Callable[[list[int], str], Any], wanted: LoadRequest) -> Figures:
    """Runs a round in this process; `answers` yields token ids for a prompt and a request id."""
    started, cpu = time.perf_counter(), time.process_time()

    async def one(number: int, prompt: list[int]) -> tuple[int, int, float]:
        tokens = chunks = 0
        first = 0.0
        async for ids in answers(prompt, f"{started}-{number}"):
            first = first or time.perf_counter()
            tokens += len(ids)
            chunks += 1
        return tokens, chunks, first

    seen = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(wanted.prompts)))
    return Figures(
        time.perf_counter() - started,
        sum(tokens for tokens, _, _ in seen),
        sum(chunks for _, chunks, _ in seen),
        [first - started for _, _, first in seen],
        time.process_time() - cpu,
    )


def vllm_alone(engine: VLLMEngine) -> Way:
    """AsyncLLM, the very one that our engine uses."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    async def answers(prompt: list[int], request_id: str, max_tokens: int) -> Any:
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        async for output in engine._engine.generate(TokensPrompt(prompt_token_ids=prompt), sampling, request_id):
            yield output.outputs[0].token_ids

    return lambda wanted: in_process(lambda p, name: answers(p, name, wanted.max_tokens), wanted)


def our_engine(engine: VLLMEngine) -> Way:
    async def answers(prompt: list[int], request_id: str, max_tokens: int) -> Any:
        sampling = SamplingOptions(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        async for chunk in engine.generate(tuple(prompt), sampling, None, request_id=request_id):
            yield chunk.token_ids

    return lambda wanted: in_process(lambda p, name: answers(p, name, wanted.max_tokens), wanted)


def over_grpc(load: LoadProcess) -> dict[str, Way]:
    def way(call: str) -> Way:
        return lambda wanted: load.run(wanted._replace(call=call))

    return {call: way(call) for call in ("stream", "unary")}


def prompts(streams: int, salt: int) -> list[list[int]]:
    """Different in every round, so that none finds its prompt in the prefix cache."""
    return [[(salt * 101 + i * 37 + k * 13) % 8000 for k in range(PROMPT_TOKENS)] for i in range(streams)]


async def group_ops(ways: dict[str, Way], streams: int, repeats: int, server: psutil.Process) -> list[dict[str, Any]]:
    """Measures the ways alternately; returns a row for each: medians, and its rate as a ratio to vLLM's."""
    seen: dict[str, list[Figures]] = {name: [] for name in ways}
    served: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for number in range(len(ways)):
            name = list(ways)[(repeat + number) % len(ways)]
            # A worker of vLLM looks for work without a pause for a second after the last.
            await asyncio.sleep(SETTLE_SECONDS)
            before = _cpu(server)
            figures = await ways[name](LoadRequest(name, prompts(streams, repeat * len(ways) + number), NEW_TOKENS))
            assert figures.tokens == streams * NEW_TOKENS
            if repeat:  # the first round warms up
                seen[name].append(figures)
                served[name].append(_cpu(server) - before)
    return [_row(name, streams, seen[name], served[name], seen["AsyncLLM"]) for name in ways]


def _row(
    name: str, streams: int, figures: list[Figures], server_cpu: list[float], base: list[Figures]
) -> dict[str, Any]:
    # Pairs of one round: what drifts on the machine lasts longer than a round.
    ratios = [b.seconds / f.seconds for f, b in zip(figures, base, strict=True)]
    return {
        "streams": streams,
        "way": name,
        "tokens_per_second": round(statistics.median(f.tokens / f.seconds for f in figures)),
        "of_vllm": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "chunks": statistics.median(f.chunks for f in figures),
        "first_chunk_ms": round(1000 * statistics.median(first for f in figures for first in f.first)),
        "front_end_cpu_s": round(statistics.median(server_cpu), 3),
        "driver_cpu_s": round(statistics.median(f.cpu for f in figures), 3),
    }


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def measure(size: str, streams: list[int], repeats: int, *, eager: bool) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        base = write_base(Path(folder) / "base", SIZES[size])
        server = ServerProcess(base, Path(folder) / "store", *_flags(), eager=eager)
        stack.callback(server.stop)
        process = psutil.Process(server.pid)
        engine = VLLMEngine(EngineOptions(str(base), enforce_eager=eager, **LIMITS))
        stack.push_async_callback(engine.stop)
        await engine.start()
        load = LoadProcess(server.address)
        stack.callback(load.close)
        ways = {"AsyncLLM": vllm_alone(engine), "VLLMEngine": our_engine(engine), **over_grpc(load)}
        rows = [row for count in streams for row in await group_ops(ways, count, repeats, process)]
        return {"size": size, "eager": eager, "cores": os.cpu_count(), "rows": rows}


def _flags() -> list[str]:
    return [text for name, value in LIMITS.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def show(result: dict[str, Any]) -> None:
    columns = list(result["rows"][0])
    print("  ".join(f"{name:>10}" for name in columns))
    for row in result["rows"]:
        print("  ".join(f"{row[name]:>{max(10, len(name))}}" for name in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 1], help="requests at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--eager", action="store_true", help="leave the model uncompiled")
    given = parser.parse_args()
    result = asyncio.run(measure(given.size, given.streams, given.repeats, eager=given.eager))
    show(result)
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
