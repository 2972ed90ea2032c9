"""The client's side of `grpc_path`: a process that requests streams of a server, as its standard input commands.

Each line in is a JSON object (see `LoadRequest`), each line out its `Figures`. It imports what a client imports, no
more.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from deltamux.client import AsyncClient, Generation


class LoadRequest(NamedTuple):
    """Requests to send.

    Attributes:
        call: ``stream`` or ``unary``.
        prompts: token ids of each request; all are sent at once.
    """

    call: str
    prompts: list[list[int]]
    max_tokens: int


class Figures(NamedTuple):
    """What a round took.

    Attributes:
        seconds: from the first request to the last answer.
        tokens: generated.
        chunks: messages that carried them.
        first: seconds to each request's first message.
        cpu: seconds of CPU that this process used.
    """

    seconds: float
    tokens: int
    chunks: int
    first: list[float]
    cpu: float


async def drive(client: AsyncClient, wanted: LoadRequest) -> Figures:
    started, cpu = time.perf_counter(), time.process_time()
    seen = await asyncio.gather(*(_one(client, wanted, prompt) for prompt in wanted.prompts))
    return Figures(
        time.perf_counter() - started,
        sum(tokens for tokens, _, _ in seen),
        sum(chunks for _, chunks, _ in seen),
        [moment - started for _, _, moment in seen],
        time.process_time() - cpu,
    )


async def _one(client: AsyncClient, wanted: LoadRequest, prompt: list[int]) -> tuple[int, int, float]:
    tokens = chunks = 0
    first = 0.0
    async for part in _answer(client, wanted, prompt):
        first = first or time.perf_counter()
        tokens += len(part.token_ids)
        chunks += 1
    return tokens, chunks, first


async def _answer(client: AsyncClient, wanted: LoadRequest, prompt: list[int]) -> AsyncIterator[Generation]:
    sampling: dict[str, Any] = {"max_tokens": wanted.max_tokens, "temperature": 0.0, "ignore_eos": True}
    if wanted.call == "unary":
        yield await client.generate(prompt, **sampling)
        return
    async for part in client.generate_stream(prompt, **sampling):
        yield part


async def main(address: str) -> None:
    async with AsyncClient(address) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await drive(client, LoadRequest(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
