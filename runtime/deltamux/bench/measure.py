"""Driving a workload against anything that streams, and the times of every token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from deltamux.bench.traffic import Request, Workload


class System(Protocol):
    """A system under test: anything that streams tokens.

    Attributes:
        vocab_size: prompts are drawn from the token ids below it.
    """

    @property
    def vocab_size(self) -> int: ...

    def stream(self, request: Request) -> AsyncGenerator[int]:
        """Generates exactly `request.new_tokens` tokens and yields, as they come, how many are new."""
        ...


@dataclass(frozen=True)
class Measurement:
    """One run of a workload; times are in seconds.

    Attributes:
        seconds: from the first request to the last token.
        tokens: generated, all requests together.
        first_token: of each request, from its sending to its first token.
        gaps: between tokens; a chunk of n tokens counts as n gaps of an n-th of its time.
    """

    seconds: float
    tokens: int
    first_token: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def median_first_token(self) -> float:
        return percentile(self.first_token, 50)

    def and_then(self, later: Measurement) -> Measurement:
        """Returns both as one."""
        return Measurement(
            self.seconds + later.seconds,
            self.tokens + later.tokens,
            self.first_token + later.first_token,
            self.gaps + later.gaps,
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the value below which `percent` of the values lie, with linear interpolation; NaN of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


async def drive(system: System, workload: Workload, seed: str) -> Measurement:
    """Runs a workload to its end.

    Raises:
        RuntimeError: a request ended with fewer or more tokens than the workload's.
    """
    arrivals = iter(workload.traffic(seed, system.vocab_size))
    done: list[_Times] = []
    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as callers:
            for _ in range(workload.sequences):
                callers.create_task(_call(system, arrivals, done))
    except ExceptionGroup as failed:  # the first failure ends the others and is the cause
        raise failed.exceptions[0] from failed
    seconds = time.perf_counter() - started
    return Measurement(
        seconds,
        sum(times.tokens for times in done),
        tuple(times.first for times in done),
        tuple(gap for times in done for gap in times.gaps),
    )


class _Times(NamedTuple):
    """The times of one request."""

    tokens: int
    first: float
    gaps: list[float]


async def _call(system: System, arrivals: Iterator[Request], done: list[_Times]) -> None:
    for request in arrivals:  # shared by all callers: a free one takes the next request
        done += [await _timed(system, request)]


async def _timed(system: System, request: Request) -> _Times:
    sent = last = time.perf_counter()
    tokens, first, gaps = 0, float("nan"), list[float]()
    async with aclosing(system.stream(request)) as chunks:
        async for count in chunks:
            now = time.perf_counter()
            if not tokens and count:
                first = now - sent
            elif count:
                gaps += [(now - last) / count] * count
            tokens, last = tokens + count, now
    if tokens != request.new_tokens:
        raise RuntimeError(f"a request for {request.new_tokens} tokens got {tokens}")
    return _Times(tokens, first, gaps)
