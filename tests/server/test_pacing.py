"""Refusals have a bounded rate per tenant, and concurrent calls are admitted a few at a time."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.client import AsyncClient
from deltamux.errors import InvalidArgumentError
from deltamux.server.transport.pacing import BURST, MAX_DELAY, REFUSALS_PER_SECOND, CallPacer, RefusalPacer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.floats(0, 0.05), st.floats(0, 20)), min_size=1, max_size=300))
def test_no_more_refusals_than_the_pace_and_one_burst_are_answered_on_time(arrivals: list[tuple[float, float]]) -> None:
    clock = Clock()
    pace = RefusalPacer(per_second=10, burst=20, clock=clock)
    on_time = 0.0
    for gap, count in arrivals:
        clock.now += gap
        late = pace.count("acme", count)
        assert 0 <= late <= MAX_DELAY
        on_time += count if late == 0 else 0
    assert on_time <= 20 + 10 * (clock.now - 1000.0) + 1e-6


def test_a_tenant_that_repeats_what_is_refused_delays_no_other_and_is_forgiven() -> None:
    clock = Clock()
    pace = RefusalPacer(per_second=10, burst=20, clock=clock)
    assert max(pace.count("acme", 1) for _ in range(20)) == pytest.approx(0)
    assert pace.count("acme", 1) == pytest.approx(0.1)
    assert pace.count("acme", 1000) == MAX_DELAY
    assert pace.count("globex", 1) == 0
    clock.now += MAX_DELAY + 2.0 + 0.1
    assert pace.count("acme", 1) == 0


async def test_refusals_beyond_the_burst_are_answered_late(client: AsyncClient) -> None:
    async def refused() -> None:
        with pytest.raises(InvalidArgumentError):
            await client.generate("hello", temperature=-1.0)

    started = time.monotonic()
    await asyncio.gather(*(refused() for _ in range(int(BURST) + 40)))
    assert time.monotonic() - started > 20 / REFUSALS_PER_SECOND


async def test_calls_are_let_in_in_their_order_without_the_cancelled_and_health_passes_them() -> None:
    seen: list[str] = []

    async def continuation(details: Any) -> None:
        seen.append(details.method)

    pacing = CallPacer()

    def call(name: str) -> asyncio.Task[Any]:
        return asyncio.create_task(pacing.intercept_service(continuation, SimpleNamespace(method=name)))

    calls = [call(f"/call/{number}") for number in range(50)]
    health = call("/grpc.health.v1.Health/Check")
    await health
    assert len(seen) < 10
    calls[40].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    names = [name for name in seen if name.startswith("/call")]
    assert names == [f"/call/{number}" for number in range(50) if number != 40]
