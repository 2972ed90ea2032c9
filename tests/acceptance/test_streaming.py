"""Streams over gRPC from a real server: cut into chunks as the machine can afford, and nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deltamux.client import Client, Generation

STREAMS = 12
OPTIONS: dict[str, Any] = {"max_tokens": 120, "temperature": 0.0, "ignore_eos": True, "logprobs": 1}
PROMPTS = [[7 + i, 3, 50 + i] for i in range(STREAMS)]


def test_chunks_add_up_to_the_unary_answer_while_many_streams_run(client: Client) -> None:
    with ThreadPoolExecutor(STREAMS) as threads:
        whole = list(threads.map(lambda prompt: client.generate(prompt, **OPTIONS), PROMPTS))
        streams = list(threads.map(lambda prompt: list(client.generate_stream(prompt, **OPTIONS)), PROMPTS))
    for chunks, answer in zip(streams, whole, strict=True):
        assert_same(chunks, answer)


def test_a_lone_stream_begins_long_before_it_ends(client: Client) -> None:
    chunks = list(client.generate_stream(PROMPTS[0], **OPTIONS))
    assert len(chunks) > 2
    assert_same(chunks, client.generate(PROMPTS[0], **OPTIONS))


def assert_same(chunks: list[Generation], answer: Generation) -> None:
    assert "".join(c.text for c in chunks) == answer.text
    assert tuple(t for c in chunks for t in c.token_ids) == answer.token_ids
    assert sum(len(c.logprobs) for c in chunks) == len(answer.logprobs) == OPTIONS["max_tokens"]
    assert [c.finish_reason for c in chunks if c.finish_reason] == [chunks[-1].finish_reason] == ["length"]
    assert chunks[-1].usage == answer.usage
