"""Slots: never more at once than the limit, every tenant its share, and a time to come back for whoever is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.errors import ResourceExhaustedError
from deltamux.server.slots import Slots


async def hold(slots: Slots, tenant: str, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(slots.take(tenant))


async def refused(slots: Slots, tenant: str) -> float:
    with pytest.raises(ResourceExhaustedError) as error:
        async with slots.take(tenant):
            pass
    assert error.value.reason == "SERVER_BUSY"
    assert error.value.retry_after is not None
    return error.value.retry_after


async def test_one_tenant_alone_may_have_every_slot_and_no_more() -> None:
    slots = Slots(3, "uploads")
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await hold(slots, "acme", stack)
        assert 0.25 <= await refused(slots, "acme") <= 45
    assert slots.used == 0


async def test_a_tenant_that_was_refused_gets_the_next_slot_before_one_that_holds_its_share() -> None:
    slots = Slots(4, "generations")
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(AsyncExitStack())
        await hold(slots, "acme", one)
        for _ in range(3):
            await hold(slots, "acme", stack)
        await refused(slots, "globex")
        await one.aclose()
        await refused(slots, "acme")
        await hold(slots, "globex", stack)


async def test_no_tenant_gets_more_than_its_bound() -> None:
    slots = Slots(4, "uploads", per_tenant=2)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await hold(slots, "acme", stack)
        await refused(slots, "acme")
        await hold(slots, "globex", stack)


async def test_who_waits_gets_its_turn_and_tenants_take_turns() -> None:
    slots = Slots(1, "compilations", max_waiting=100)
    order: list[str] = []

    async def work(tenant: str) -> None:
        async with slots.take(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work(tenant)) for tenant in ("acme",) * 5 + ("globex", "")]
    await asyncio.gather(*tasks)
    assert set(order[1:4]) == {"acme", "globex", ""}
    assert Counter(order) == {"acme": 5, "globex": 1, "": 1}
    assert (slots.used, slots.waiting) == (0, 0)


async def test_who_waits_too_long_is_told_when_to_come_back() -> None:
    slots = Slots(1, "uploads", max_waiting=4, patience=0.05)
    async with slots.take("acme"):
        await refused(slots, "acme")
        assert slots.waiting == 0


async def test_one_tenant_takes_at_most_half_of_the_places_to_wait() -> None:
    slots = Slots(1, "uploads", max_waiting=4)
    async with slots.take("acme"):
        waiting = [asyncio.create_task(refused_later(slots, "acme")) for _ in range(2)]
        await asyncio.sleep(0)
        await refused(slots, "acme")
        waiting.append(asyncio.create_task(refused_later(slots, "globex")))
        await asyncio.sleep(0)
        assert slots.waiting == 3
    await asyncio.gather(*waiting)
    assert (slots.used, slots.waiting) == (0, 0)


async def refused_later(slots: Slots, tenant: str) -> None:
    async with slots.take(tenant):
        await asyncio.sleep(0)


async def test_the_more_are_refused_the_later_and_the_further_apart_they_come_back() -> None:
    slots = Slots(10, "generations")
    async with AsyncExitStack() as stack:
        for _ in range(10):
            await hold(slots, "acme", stack)
        times = [await refused(slots, "acme") for _ in range(200)]
    assert sum(times[150:]) > 2 * sum(times[:50])
    assert max(times[150:]) > 1.5 * min(times[150:])


ACTIONS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=30)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 6), ACTIONS)
def test_whatever_happens_the_bounds_hold_and_every_slot_comes_back(
    limit: int, per_tenant: int, max_waiting: int, actions: list[tuple[str, int, bool]]
) -> None:
    async def run() -> None:
        slots = Slots(limit, "uploads", per_tenant=per_tenant, max_waiting=max_waiting)
        held: Counter[str] = Counter()

        async def work(tenant: str, turns: int) -> None:
            async with slots.take(tenant):
                held[tenant] += 1
                assert held.total() <= limit
                assert held[tenant] <= per_tenant
                try:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                finally:
                    held[tenant] -= 1

        tasks = []
        for tenant, turns, cancelled in actions:
            tasks.append(asyncio.create_task(work(tenant, turns)))
            await asyncio.sleep(0)
            if cancelled:
                tasks[len(tasks) // 2].cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, ResourceExhaustedError | asyncio.CancelledError)
        assert (slots.used, slots.waiting) == (0, 0)

    asyncio.run(run())
