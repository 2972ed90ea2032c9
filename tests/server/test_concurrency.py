"""ConcurrencyLimit: the bound, the share of every tenant, and the retry time of refused callers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.errors import ResourceExhaustedError
from deltamux.server.access.concurrency import ConcurrencyLimit


async def hold(limit: ConcurrencyLimit, tenant: str, stack: AsyncExitStack, times: int = 1) -> None:
    for _ in range(times):
        await stack.enter_async_context(limit.acquire(tenant))


async def refused(limit: ConcurrencyLimit, tenant: str) -> float:
    with pytest.raises(ResourceExhaustedError) as error:
        async with limit.acquire(tenant):
            pass
    assert error.value.reason == "SERVER_BUSY"
    assert error.value.retry_after is not None
    return error.value.retry_after


async def test_one_tenant_alone_may_have_every_slot_and_no_more() -> None:
    limit = ConcurrencyLimit(3, "uploads")
    async with AsyncExitStack() as stack:
        await hold(limit, "acme", stack, times=3)
        assert 0.25 <= await refused(limit, "acme") <= 45
    assert limit.used == 0


async def test_a_tenant_that_was_refused_gets_the_next_slot_before_one_that_holds_its_share() -> None:
    limit = ConcurrencyLimit(4, "generations")
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(AsyncExitStack())
        await hold(limit, "acme", one)
        await hold(limit, "acme", stack, times=3)
        await refused(limit, "globex")
        await one.aclose()
        await refused(limit, "acme")
        await hold(limit, "globex", stack)


async def test_the_last_slots_go_to_tenants_that_hold_none() -> None:
    limit = ConcurrencyLimit(4, "uploads", reserved=2)
    async with AsyncExitStack() as stack:
        await hold(limit, "acme", stack, times=2)
        await refused(limit, "acme")
        for tenant in ("globex", "initech"):
            await hold(limit, tenant, stack)
            await refused(limit, "acme")
        await refused(limit, "hooli")


class StalledUploads:
    """Work that is overdue by so many seconds, until it is cancelled."""

    def __init__(self, overdue: float) -> None:
        self._overdue = overdue
        self._ended = asyncio.Event()

    def overdue(self) -> float:
        return self._overdue

    def cancel(self) -> None:
        self._ended.set()

    async def hold(self, limit: ConcurrencyLimit, tenant: str) -> None:
        async with limit.acquire(tenant) as permit:
            permit.holder = self
            await self._ended.wait()


@asynccontextmanager
async def stalled(limit: ConcurrencyLimit, holders: list[tuple[str, float]]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Permits that are held by tenants whose work is overdue by so many seconds."""
    tasks = [asyncio.create_task(StalledUploads(overdue).hold(limit, tenant)) for tenant, overdue in holders]
    await asyncio.sleep(0)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_for_a_caller_that_waits_the_most_overdue_work_is_cancelled_and_no_other() -> None:
    limit = ConcurrencyLimit(3, "uploads", queue_size=8, timeout=5)
    async with stalled(limit, [("acme", 1.0), ("globex", 7.0), ("globex", 3.0)]) as tasks, limit.acquire("initech"):
        assert [task.done() for task in tasks] == [False, True, False]


@pytest.mark.parametrize(
    ("overdue", "tenant"), [(-1.0, "initech"), (0.0, "initech"), (9.0, "acme")], ids=["ahead", "in time", "its own"]
)
async def test_work_that_is_in_time_or_of_the_same_tenant_is_not_cancelled_for_a_caller_that_waits(
    overdue: float, tenant: str
) -> None:
    limit = ConcurrencyLimit(1, "uploads", queue_size=8, timeout=1.2)
    async with stalled(limit, [("acme", overdue)]) as tasks:
        await refused(limit, tenant)
        assert not tasks[0].done()


async def test_places_to_wait_are_left_for_a_tenant_of_which_none_waits() -> None:
    limit = ConcurrencyLimit(1, "uploads", queue_size=8)
    async with limit.acquire("acme"):
        waiting = [asyncio.create_task(refused_later(limit, tenant)) for tenant in ("acme",) * 4 + ("globex",) * 2]
        await asyncio.sleep(0)
        await refused(limit, "acme")
        await refused(limit, "globex")
        waiting.append(asyncio.create_task(refused_later(limit, "initech")))
        await asyncio.sleep(0)
        assert limit.waiting == 7
    await asyncio.gather(*waiting)


async def test_waiting_calls_are_admitted_and_tenants_alternate() -> None:
    limit = ConcurrencyLimit(1, "compilations", queue_size=100)
    order: list[str] = []

    async def work(tenant: str) -> None:
        async with limit.acquire(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work(tenant)) for tenant in ("acme",) * 5 + ("globex", "")]
    await asyncio.gather(*tasks)
    assert set(order[1:4]) == {"acme", "globex", ""}
    assert Counter(order) == {"acme": 5, "globex": 1, "": 1}
    assert (limit.used, limit.waiting) == (0, 0)


async def test_a_caller_that_waits_too_long_is_refused_with_a_retry_time() -> None:
    limit = ConcurrencyLimit(1, "uploads", queue_size=4, timeout=0.05)
    async with limit.acquire("acme"):
        await refused(limit, "acme")
        assert limit.waiting == 0


async def test_one_tenant_takes_at_most_half_of_the_places_to_wait() -> None:
    limit = ConcurrencyLimit(1, "uploads", queue_size=4)
    async with limit.acquire("acme"):
        waiting = [asyncio.create_task(refused_later(limit, "acme")) for _ in range(2)]
        await asyncio.sleep(0)
        await refused(limit, "acme")
        waiting.append(asyncio.create_task(refused_later(limit, "globex")))
        await asyncio.sleep(0)
        assert limit.waiting == 3
    await asyncio.gather(*waiting)
    assert (limit.used, limit.waiting) == (0, 0)


async def refused_later(limit: ConcurrencyLimit, tenant: str) -> None:
    async with limit.acquire(tenant):
        await asyncio.sleep(0)


async def test_the_more_are_refused_the_later_and_the_further_apart_they_come_back() -> None:
    limit = ConcurrencyLimit(10, "generations")
    async with AsyncExitStack() as stack:
        await hold(limit, "acme", stack, times=10)
        times = [await refused(limit, "acme") for _ in range(200)]
    assert sum(times[150:]) > 2 * sum(times[:50])
    assert max(times[150:]) > 1.5 * min(times[150:])


ACTIONS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=30)


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 6), ACTIONS)
def test_whatever_happens_the_bounds_hold_and_every_permit_comes_back(
    size: int, reserved: int, queue_size: int, actions: list[tuple[str, int, bool]]
) -> None:
    async def run() -> None:
        limit = ConcurrencyLimit(size, "uploads", reserved=reserved, queue_size=queue_size)
        held: Counter[str] = Counter()

        async def work(tenant: str, turns: int) -> None:
            async with limit.acquire(tenant):
                held[tenant] += 1
                assert held.total() <= size
                assert held[tenant] <= max(1, size - reserved)
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
        assert (limit.used, limit.waiting) == (0, 0)

    asyncio.run(run())
