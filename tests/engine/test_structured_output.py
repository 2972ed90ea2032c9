"""Structured output at a real engine: it holds, and one grammar costs the streams of others next to nothing."""

from __future__ import annotations

import asyncio
import json
import re

from deltamux.engine.base import GuidedDecoding, SamplingOptions
from deltamux.engine.vllm.engine import VLLMEngine

PROMPT = (5, 17, 20)


async def text_of(engine: VLLMEngine, guided: GuidedDecoding, name: str) -> str:
    sampling = SamplingOptions(max_tokens=200, temperature=1.0, seed=7, guided=guided)
    chunks = engine.generate(PROMPT, sampling, None, request_id=name, stream=False)
    return "".join([chunk.text async for chunk in chunks])


async def test_the_output_keeps_to_its_format(engine: VLLMEngine) -> None:
    choices = ('yes "indeed"', "no\n", "m\u00fcde")
    assert await text_of(engine, GuidedDecoding(choice=choices), "choice") in choices
    assert re.fullmatch("[ab]{10}", await text_of(engine, GuidedDecoding(regex="[ab]{10}"), "regex"))
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    written = await text_of(engine, GuidedDecoding(json_schema=json.dumps(schema)), "schema")
    assert json.loads(written)["a"] in ("x", "y")


async def test_grammars_of_many_requests_at_once_hold(engine: VLLMEngine) -> None:
    formats = [GuidedDecoding(regex=f"[ab]{{{n}}}") for n in range(1, 9)]
    texts = await asyncio.gather(*(text_of(engine, guided, f"many-{n}") for n, guided in enumerate(formats)))
    assert [len(text) for text in texts] == list(range(1, 9))
