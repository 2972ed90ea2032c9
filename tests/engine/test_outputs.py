"""The output collector of one request: what is handed over at once, what gathers, and that nothing is left in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.engine.output_processor import RequestOutputCollector

from deltamux.engine.vllm.frontend.outputs import LONGEST_INTERVAL, Pace, PacedCollector
from deltamux_testing.engines import NeverDue

PATIENCE = 30.0


def piece(text: str, *, finished: bool = False) -> RequestOutput:
    reason = "length" if finished else None
    completion = CompletionOutput(0, text, [ord(c) for c in text], None, None, finish_reason=reason)
    return RequestOutput("request", None, None, None, [completion], finished)


def new_collector(*already: RequestOutput, pace: Pace | None = None) -> PacedCollector:
    made = RequestOutputCollector(RequestOutputKind.DELTA, "request")
    for output in already:
        made.put(output)
    return PacedCollector.adopt(made, pace or NeverDue())


async def taken(collector: PacedCollector) -> str:
    async with asyncio.timeout(PATIENCE):
        completion = (await collector.take()).outputs[0]
    assert list(completion.token_ids) == [ord(c) for c in completion.text]
    return completion.text


async def test_what_vllm_had_put_in_already_is_the_first_chunk() -> None:
    assert await taken(new_collector(piece("a"))) == "a"


async def test_outputs_gather_after_the_first_until_the_last_comes() -> None:
    collector = new_collector()
    collector.put(piece("a"))
    assert await taken(collector) == "a"
    for text in "bc":
        collector.put(piece(text))
    await asyncio.sleep(0)
    assert not collector.ready.is_set()
    collector.put(piece("d", finished=True))
    assert await taken(collector) == "bcd"


@pytest.mark.parametrize(
    ("error", "raised"), [(EngineDeadError, EngineDeadError), (lambda: KeyError("x"), EngineGenerateError)]
)
async def test_an_error_is_returned_at_once_in_place_of_what_gathered(
    error: Callable[[], Exception], raised: type[Exception]
) -> None:
    collector = new_collector(piece("a"))
    await taken(collector)
    collector.put(piece("b"))
    collector.put(error())
    with pytest.raises(raised):
        await taken(collector)


async def test_what_has_gathered_is_handed_over_though_nothing_more_comes() -> None:
    collector = new_collector(piece("a"), pace=Pace(lambda: 10**9, 1))
    await taken(collector)
    collector.put(piece("b"))
    assert await taken(collector) == "b"


@pytest.mark.parametrize("running", [1, 10**9])
async def test_an_output_after_the_interval_is_returned_with_those_before_it(running: int) -> None:
    collector = new_collector(piece("a"), pace=Pace(lambda: running, 1))
    await taken(collector)
    collector.put(piece("b"))
    await asyncio.sleep(1.1 * LONGEST_INTERVAL)
    collector.put(piece("c"))
    assert await taken(collector) == "bc"


async def test_a_reader_that_was_cancelled_gets_the_next_chunk_later() -> None:
    collector = new_collector(piece("a"))
    await taken(collector)
    reading = asyncio.ensure_future(collector.take())
    await asyncio.sleep(0)
    reading.cancel()
    collector.put(piece("b", finished=True))
    assert await taken(collector) == "b"


def test_the_pace_slows_with_the_requests_and_never_beyond_the_longest_interval() -> None:
    def interval(running: int, cores: int) -> float:
        return Pace(lambda: running, cores).interval()

    assert [interval(n, 4) for n in (1, 10, 50, 10_000)] == [0.001, 0.01, 0.05, LONGEST_INTERVAL]
    assert interval(100, 8) == interval(100, 128)
