"""The demo's server process and its traffic."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from deltamux.client import AsyncClient
from deltamux.errors import UnavailableError
from deltamux_trainers.demo.skills import Message
from deltamux_trainers.demo.tasks import score

READY = re.compile(r"ready on (\S+)")
PARALLEL = 32


class Job(NamedTuple):
    """One request: an adapter's name (None: the base), and a dialogue whose last message is the expected answer."""

    adapter: str | None
    dialogue: list[Message]

    @property
    def expected(self) -> str:
        return self.dialogue[-1]["content"]


class Throughput(NamedTuple):
    label: str
    tokens_per_second: float


def serve_command(model: str, store: Path, listen: str) -> list[str]:
    # In float32 no answer depends on the other requests of the batch; in bfloat16, rounding may decide a tie.
    # Without compilation the server starts sooner.
    served = ["--model", model, "--store", str(store), "--listen", listen, "--dtype", "float32", "--enforce-eager"]
    return ["deltamux", "serve", *served]


@contextmanager
def serving(model: str, store: Path) -> Iterator[str]:
    """Runs a server process for the length of the block and yields its address; its log is next to the store."""
    command = serve_command(model, store, "127.0.0.1:0")
    program = [sys.executable, "-c", "import sys; from deltamux.cli import main; sys.exit(main())"]
    with (store.parent / "server.log").open("w") as log:
        process = subprocess.Popen([*program, *command[1:]], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield _address(process, Path(log.name))
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    for text in process.stdout:
        if found := READY.match(text):
            return found[1]
    raise UnavailableError(f"the demo's server did not start; its log is {log}:\n{log.read_text()[-2000:]}")


async def answers(client: AsyncClient, jobs: Sequence[Job], max_tokens: int = 48) -> list[str]:
    """Returns the answers to all jobs, of any adapters, with PARALLEL streams at a time: they share batches."""
    free = asyncio.Semaphore(PARALLEL)

    async def answer(job: Job) -> str:
        async with free:
            options = {"max_tokens": max_tokens, "temperature": 0.0}
            stream = client.generate_stream(job.dialogue[:-1], adapter=job.adapter, **options)
            return "".join([chunk.text async for chunk in stream])

    return await asyncio.gather(*map(answer, jobs))


async def scores(client: AsyncClient, jobs: Sequence[Job]) -> float:
    """Returns the share of right answers."""
    return score(await answers(client, jobs), [job.expected for job in jobs])


async def throughput(client: AsyncClient, label: str, adapters: Sequence[str | None]) -> Throughput:
    """Returns the generated tokens per second, with PARALLEL sequences of 64 tokens over the given adapters."""

    async def run(adapter: str | None, number: int) -> int:
        prompt = [5 + number, *range(20, 28)]
        whole = await client.generate(prompt, adapter=adapter, max_tokens=64, temperature=0.0, ignore_eos=True)
        return len(whole.token_ids)

    best = 0.0
    for _ in range(3):
        started = time.monotonic()
        counts = await asyncio.gather(*(run(adapters[i % len(adapters)], i) for i in range(PARALLEL)))
        best = max(best, sum(counts) / (time.monotonic() - started))
    return Throughput(label, best)


def read_jobs(file: Path, adapter: str | None) -> list[Job]:
    with file.open(encoding="utf-8") as lines:
        return [Job(adapter, json.loads(text)["messages"]) for text in lines]
