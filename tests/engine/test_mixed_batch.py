"""A request's answer never depends on the other requests of its batch."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings

from deltamux.conformance.parity import Greedy, assert_same
from deltamux.engine.base import Engine, ProgramRef
from deltamux_testing.mixed_batches import NAMES, Request, requests, run


@pytest.mark.parametrize("index", range(1 + len(NAMES)), ids=lambda index: ("none", *NAMES)[index])
async def test_a_program_alone_generates_what_the_reference_executor_does(
    index: int, engine: Engine, programs: dict[str, ProgramRef], expected: dict[Request, Greedy]
) -> None:
    plain, *_ = expected.values()
    request, answer = list(expected.items())[index]
    assert index == 0 or answer.token_ids != plain.token_ids, "it must be visible, or this test could not fail"
    assert_same(answer, await run(engine, programs, request))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=requests())
async def test_a_mixed_batch_gives_each_request_what_it_gets_alone(
    batch: list[Request], engine: Engine, programs: dict[str, ProgramRef]
) -> None:
    together = await asyncio.gather(*(run(engine, programs, request) for request in batch))
    for request, mixed in zip(batch, together, strict=True):
        assert_same(await run(engine, programs, request), mixed)


async def test_requests_that_join_and_leave_change_no_other(engine: Engine, programs: dict[str, ProgramRef]) -> None:
    steady: list[Request] = [(name, (7, 8, 9, index), 40) for index, name in enumerate((None, *NAMES[:3]))]
    alone = [await run(engine, programs, request) for request in steady]
    running = [asyncio.create_task(run(engine, programs, request)) for request in steady]
    for index in range(20):
        await run(engine, programs, (NAMES[index % len(NAMES)], (index + 3, 11, 12), 1 + index % 3))
    for expected, task in zip(alone, running, strict=True):
        assert_same(expected, await task)


async def test_a_prefix_is_computed_once_and_shared_through_the_prefix_cache(
    engine: Engine, programs: dict[str, ProgramRef]
) -> None:
    prompt = tuple(range(50, 90))
    first = await run(engine, programs, ("prefix-long", prompt, 8))
    again = await run(engine, programs, ("prefix-long", prompt, 8))
    assert_same(first, again)
    other = await run(engine, programs, ("low-rank", prompt, 8))
    assert other.token_ids != first.token_ids, "another adapter must not read this one's cached prefix"
