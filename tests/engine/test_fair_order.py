"""The order in which the engine begins requests: tenants alternate, and no request waits for ever."""

from __future__ import annotations

import asyncio
import heapq
from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from deltamux.engine.base import SamplingOptions
from deltamux.engine.fair import FairOrder, Place
from deltamux.engine.vllm.frontend.engine import VLLMEngine


def test_a_group_with_few_in_the_queue_goes_before_one_with_many() -> None:
    order = FairOrder()
    with ExitStack() as stack:
        many = [stack.enter_context(order.place("acme")) for _ in range(100)]
        for place in many[:10]:
            place.begin()
        few = [stack.enter_context(order.place("globex")) for _ in range(2)]
        assert sum(place.number < few[0].number for place in many[10:]) == 0
        assert sum(place.number < few[1].number for place in many[10:]) <= 1


def test_one_after_the_other_never_overtakes_a_queue_for_good() -> None:
    order = FairOrder()
    with ExitStack() as stack:
        queue = [stack.enter_context(order.place("acme")) for _ in range(50)]
        overtook = 0
        while True:
            with order.place("globex") as place:
                if place.number > queue[-1].number:
                    break
                place.begin()
                overtook += 1
        assert overtook <= 51


def test_what_was_given_up_is_not_held_against_its_group() -> None:
    order = FairOrder()
    with order.place("globex"):
        for _ in range(100):
            with order.place("acme"):
                pass
        with order.place("acme") as place:
            assert place.number == 0


def test_an_idle_order_forgets_all_groups() -> None:
    order = FairOrder()
    for number in range(100):
        with order.place(f"tenant-{number}") as place:
            place.begin()
    assert not order._next


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=80))
def test_of_equal_groups_that_always_wait_each_gets_its_share(arrivals: list[tuple[str, bool]]) -> None:
    order, waiting, served = FairOrder(), list[tuple[int, int, str, Place]](), {"x": 0, "y": 0}
    with ExitStack() as stack:
        for at, (group, serve) in enumerate([("x", False), ("y", False)] * 40 + arrivals):
            place = stack.enter_context(order.place(group))
            heapq.heappush(waiting, (place.number, at, group, place))
            if serve and waiting:
                *_, first, begun = heapq.heappop(waiting)
                begun.begin()
                served[first] = served.get(first, 0) + 1
        assert abs(served["x"] - served["y"]) <= 1


async def test_another_tenant_goes_before_the_waiting_requests_of_one_that_fills_the_queue(engine: VLLMEngine) -> None:
    batch, queued = 16, 64

    async def run(group: str, number: int, max_tokens: int) -> None:
        sampling = SamplingOptions(max_tokens=max_tokens, ignore_eos=True)
        name = f"{group}-{number}"
        async for _ in engine.generate((5, 17, number), sampling, None, request_id=name, stream=False, group=group):
            pass

    greedy = [asyncio.create_task(run("acme", number, 60)) for number in range(queued)]
    while (await engine.stats()).running < queued:  # noqa: ASYNC110 - another process's doing
        await asyncio.sleep(0.01)
    await run("globex", 1, 2)
    assert sum(task.done() for task in greedy) <= 2 * batch
    await asyncio.gather(*greedy)
