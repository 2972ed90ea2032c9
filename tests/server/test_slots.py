"""Slots: never more at once than the limit, every tenant its share, and a time to come back for whoever is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.errors import ResourceExhaustedError
from deltamux.server.access.concurrency import Slots


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


async def test_the_last_slots_go_to_tenants_that_hold_none() -> None:
    slots = Slots(4, "uploads", reserved=2)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await hold(slots, "acme", stack)
        await refused(slots, "acme")
        for tenant in ("globex", "initech"):
            await hold(slots, tenant, stack)
            await refused(slots, "acme")
        await refused(slots, "hooli")


class Stalled:
    """A holder that is behind, and ends when it is told to."""

    def __init__(self, behind: float) -> None:
        self._behind = behind
        self._ended = asyncio.Event()

    def behind(self) -> float:
        return self._behind

    def give_up(self) -> None:
        self._ended.set()

    async def hold(self, slots: Slots, tenant: str) -> None:
        async with slots.take(tenant) as slot:
            slot.holder = self
            await self._ended.wait()


@asynccontextmanager
async def stalled(slots: Slots, holders: list[tuple[str, float]]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Slots that are held by tenants that are behind by so many seconds."""
    tasks = [asyncio.create_task(Stalled(behind).hold(slots, tenant)) for tenant, behind in holders]
    await asyncio.sleep(0)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_waits_has_the_slot_ended_that_is_furthest_behind_and_no_other() -> None:
    slots = Slots(3, "uploads", max_waiting=8, patience=5)
    async with stalled(slots, [("acme", 1.0), ("globex", 7.0), ("globex", 3.0)]) as tasks, slots.take("initech"):
        assert [task.done() for task in tasks] == [False, True, False]


@pytest.mark.parametrize(
    ("behind", "tenant"), [(-1.0, "initech"), (0.0, "initech"), (9.0, "acme")], ids=["ahead", "in time", "its own"]
)
async def test_what_keeps_its_pace_or_is_of_the_same_tenant_is_not_ended_for_who_waits(
    behind: float, tenant: str
) -> None:
    slots = Slots(1, "uploads", max_waiting=8, patience=1.2)
    async with stalled(slots, [("acme", behind)]) as tasks:
        await refused(slots, tenant)
        assert not tasks[0].done()


async def test_places_to_wait_are_left_for_a_tenant_of_which_none_waits() -> None:
    slots = Slots(1, "uploads", max_waiting=8)
    async with slots.take("acme"):
        waiting = [asyncio.create_task(refused_later(slots, tenant)) for tenant in ("acme",) * 4 + ("globex",) * 2]
        await asyncio.sleep(0)
        await refused(slots, "acme")
        await refused(slots, "globex")
        waiting.append(asyncio.create_task(refused_later(slots, "initech")))
        await asyncio.sleep(0)
        assert slots.waiting == 7
    await asyncio.gather(*waiting)


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


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 6), ACTIONS)
def test_whatever_happens_the_bounds_hold_and_every_slot_comes_back(
    limit: int, reserved: int, max_waiting: int, actions: list[tuple[str, int, bool]]
) -> None:
    async def run() -> None:
        slots = Slots(limit, "uploads", reserved=reserved, max_waiting=max_waiting)
        held: Counter[str] = Counter()

        async def work(tenant: str, turns: int) -> None:
            async with slots.take(tenant):
                held[tenant] += 1
                assert held.total() <= limit
                assert held[tenant] <= max(1, limit - reserved)
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
