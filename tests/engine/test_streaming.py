"""How a generation is cut into chunks: the first token at once; the others as the reader, or the pace, allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from deltamux.engine.base import GenerationChunk, SamplingOptions
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux_testing.engines import NeverDue, settled

NEW_TOKENS = 100
GREEDY = SamplingOptions(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=1)
PROMPT = (5, 17, 99)


@pytest.fixture
def never_due(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_pace", NeverDue())


def stream(engine: VLLMEngine, name: str, sampling: SamplingOptions = GREEDY) -> AsyncIterator[GenerationChunk]:
    return engine.generate(PROMPT, sampling, None, request_id=name)


async def chunks_of(engine: VLLMEngine, name: str, sampling: SamplingOptions = GREEDY) -> list[GenerationChunk]:
    return [chunk async for chunk in stream(engine, name, sampling)]


def assert_same_content(expected: list[GenerationChunk], actual: list[GenerationChunk]) -> None:
    for chunks in (expected, actual):
        assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert {chunk.prompt_tokens for chunk in chunks} == {len(PROMPT)}
    assert "".join(c.text for c in expected) == "".join(c.text for c in actual)
    assert [t for c in expected for t in c.token_ids] == [t for c in actual for t in c.token_ids]
    logprobs = [[p.logprob for c in chunks for p in c.logprobs] for chunks in (expected, actual)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


async def test_the_first_token_waits_for_no_other(engine: VLLMEngine, never_due: None) -> None:
    async with aclosing(stream(engine, "first")) as chunks:  # type: ignore[type-var]  # a generator
        assert len((await anext(chunks)).token_ids) < NEW_TOKENS // 2


async def test_a_reader_that_is_away_finds_one_chunk_with_all_that_came_meanwhile(engine: VLLMEngine) -> None:
    expected = await chunks_of(engine, "reads")
    slow: list[GenerationChunk] = []
    async for chunk in stream(engine, "away"):
        slow.append(chunk)
        await settled(engine)
    assert len(slow) == 2
    assert len(slow[0].token_ids) < NEW_TOKENS // 2
    assert_same_content(expected, slow)


async def test_on_a_busy_machine_tokens_gather_and_nothing_else_changes(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await chunks_of(engine, "calm")
    monkeypatch.setattr(engine, "_pace", NeverDue())
    gathered = await chunks_of(engine, "busy")
    assert len(gathered) == 2
    assert len(gathered[0].token_ids) < NEW_TOKENS // 2
    assert_same_content(expected, gathered)


async def test_a_stop_string_ends_a_gathered_stream_at_once(engine: VLLMEngine, never_due: None) -> None:
    whole = "".join(chunk.text for chunk in await chunks_of(engine, "without stop"))
    stop = whole[40:44]
    sampling = SamplingOptions(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, stop=(stop,))
    chunks = await chunks_of(engine, "with stop", sampling)
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop)
    assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]


async def test_closing_a_gathered_stream_aborts_it_in_the_engine(engine: VLLMEngine, never_due: None) -> None:
    async with aclosing(stream(engine, "closed")) as chunks:  # type: ignore[type-var]  # a generator
        await anext(chunks)
        reading = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert (await engine.stats()).running == 0


async def test_a_request_that_is_not_streamed_is_answered_whole(engine: VLLMEngine) -> None:
    chunks = [chunk async for chunk in engine.generate(PROMPT, GREEDY, None, request_id="whole", stream=False)]
    assert [len(chunk.token_ids) for chunk in chunks] == [NEW_TOKENS]
    assert_same_content(await chunks_of(engine, "in parts"), chunks)


async def test_alternatives_are_not_detokenized_where_no_text_is_returned(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(
        "vllm.v1.engine.logprobs.convert_ids_list_to_tokens",
        lambda tokenizer, ids: decoded.append(ids) or ["" for _ in ids],  # type: ignore[func-returns-value]  # or
    )
    chunks = await chunks_of(engine, "alternatives", SamplingOptions(max_tokens=20, ignore_eos=True, logprobs=20))
    assert [len(logprobs.top) >= 20 for chunk in chunks for logprobs in chunk.logprobs] == [True] * 20
    assert len(decoded) <= 1
