"""Sends random calls to a server that runs, and generations that are right between them.

    python -m fuzz.rpcs --address 127.0.0.1:8470 --seconds 600     (in tests/)

A call may be refused; it may not end with INTERNAL, UNKNOWN or UNAVAILABLE, or without an answer. Every tenth call is a
generation whose answer is known from the start, and must stay so. Use a server of its own: the calls delete things.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
from hypothesis import HealthCheck, Phase, given, seed, settings

from deltamux.client import AsyncClient
from fuzz.messages import ADAPTER, METHODS, calls

FORBIDDEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
OURS = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
"""How our own deadline ends what has no end: a watch, or a long generation."""

SECONDS = 5.0
KNOWN: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}


class WrongAnswerError(AssertionError):
    """The server answered a call as it must not."""


async def send(channel: grpc.aio.Channel, name: str, raw: list[bytes], seconds: float = SECONDS) -> grpc.StatusCode:
    """Sends a call; returns its status. Raises WrongAnswerError for one that no call may have."""
    method = METHODS[name]
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    start: Any = getattr(channel, kind)(f"/{name}")
    call = start(iter(raw) if method.client_streaming else raw[0], timeout=seconds)
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        if error.code() in FORBIDDEN:
            raise WrongAnswerError(f"{name} {raw!r}: {error.code().name}: {error.details()}"[:3000]) from error
        return error.code()
    return grpc.StatusCode.OK


class Known:
    """Generations whose answers are known."""

    def __init__(self, client: AsyncClient, prompts: Iterable[list[int]] = ([5, 17, 20], [9, 9, 30, 31])) -> None:
        self._client = client
        self._prompts = list(prompts)
        self._answers: list[tuple[int, ...]] = []

    async def learn(self) -> None:
        self._answers = [(await self._client.generate(prompt, **KNOWN)).token_ids for prompt in self._prompts]

    async def check(self) -> None:
        """Raises WrongAnswerError where an answer is another than it was."""
        for prompt, expected in zip(self._prompts, self._answers, strict=True):
            actual = (await self._client.generate(prompt, **KNOWN, timeout=60)).token_ids
            if actual != expected:
                raise WrongAnswerError(f"{prompt} gave {actual}, and {expected} before")


async def run(address: str, seconds: float, start: int, adapter: Path | None = None) -> Counter[str]:
    """Sends calls for so many seconds, `adapter` uploaded before each batch; returns how often each status came."""
    statuses: Counter[str] = Counter()
    until = time.monotonic() + seconds
    async with AsyncClient(address) as client, grpc.aio.insecure_channel(address) as channel:
        known = Known(client)
        await known.learn()
        for number in range(start, sys.maxsize):
            if time.monotonic() > until:
                return statuses
            batch = await asyncio.to_thread(drawn, number)
            if adapter is not None:
                await client.upload_adapter(ADAPTER, adapter)  # the calls delete it
            done = await asyncio.gather(*(send(channel, name, raw) for name, raw in batch))
            statuses.update(code.name for code in done)
            await known.check()
    return statuses


def drawn(number: int, count: int = 20) -> list[tuple[str, list[bytes]]]:
    """Returns some calls, the same for the same number."""
    batch: list[tuple[str, list[bytes]]] = []

    @seed(number)
    @settings(max_examples=count, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(calls())
    def draw(call: tuple[str, list[bytes]]) -> None:
        batch.append(call)

    draw()
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="that a failed run printed (default: a random one)")
    parser.add_argument("--adapter", type=Path, help="directory of an adapter for the base, that the calls may name")
    options = parser.parse_args()
    start = options.seed if options.seed is not None else random.randrange(10**9)
    print(f"seed {start}", flush=True)
    for status, count in asyncio.run(run(options.address, options.seconds, start, options.adapter)).most_common():
        print(f"{count:8} {status}")


if __name__ == "__main__":
    main()
