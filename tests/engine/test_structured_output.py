"""Structured output at a real engine: it holds, and one grammar costs the streams of others next to nothing."""

from __future__ import annotations

import asyncio
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from deltamux.engine.base import SamplingOptions, StructuredOutput
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.engine.vllm.scheduling.grammars import CachedCompiler
from deltamux.errors import InvalidArgumentError

PROMPT = (5, 17, 20)


async def text_of(engine: VLLMEngine, structured_output: StructuredOutput, name: str, **given: Any) -> str:
    sampling = SamplingOptions(max_tokens=200, temperature=1.0, seed=7, structured_output=structured_output, **given)
    chunks = engine.generate(PROMPT, sampling, None, request_id=name, stream=False)
    return "".join([chunk.text async for chunk in chunks])


async def test_the_output_keeps_to_its_format(engine: VLLMEngine) -> None:
    choices = ('yes "indeed"', "no\n", "m\u00fcde")
    assert await text_of(engine, StructuredOutput(choice=choices), "choice") in choices
    assert re.fullmatch("[ab]{10}", await text_of(engine, StructuredOutput(regex="[ab]{10}"), "regex"))
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    written = await text_of(engine, StructuredOutput(json_schema=json.dumps(schema)), "schema")
    assert json.loads(written)["a"] in ("x", "y")


async def test_grammars_of_many_requests_at_once_hold(engine: VLLMEngine) -> None:
    formats = [StructuredOutput(regex=f"[ab]{{{n}}}") for n in range(1, 9)]
    texts = await asyncio.gather(*(text_of(engine, each, f"many-{n}") for n, each in enumerate(formats)))
    assert [len(text) for text in texts] == list(range(1, 9))


async def test_special_tokens_are_no_part_of_a_format_since_the_text_leaves_them_out(engine: VLLMEngine) -> None:
    pad = 0
    written = await text_of(engine, StructuredOutput(regex='"[^"]{10}"'), "special", logit_bias={pad: 100.0})
    assert re.fullmatch('"[^"]{10}"', written)
    assert await text_of(engine, StructuredOutput(choice=("<pad>",)), "special") == "<pad>"


async def test_with_a_format_a_stop_token_of_text_is_refused_and_a_special_one_is_accepted(engine: VLLMEngine) -> None:
    pad, letter = 0, 67
    with pytest.raises(InvalidArgumentError, match="stop_token_ids holds 67") as refused:
        await text_of(engine, StructuredOutput(regex="[ab]{10}"), "letter", stop_token_ids=(pad, letter))
    assert refused.value.metadata["field"] == "sampling.stop_token_ids"
    assert re.fullmatch("a{3}", await text_of(engine, StructuredOutput(regex="a{3}"), "pad", stop_token_ids=(pad,)))


def test_a_format_ends_the_text_so_that_nothing_may_follow_its_end() -> None:
    with pytest.raises(InvalidArgumentError, match="ignore_eos must be false with structured_output"):
        SamplingOptions(ignore_eos=True, structured_output=StructuredOutput(choice=("yes", "no")))


async def test_what_the_gate_lets_pass_the_engine_can_compile(engine: VLLMEngine) -> None:
    lengths = {f"p{most}": {"type": "string", "maxLength": most} for most in (900, 700, 600)}
    schema = {"type": "object", "properties": lengths | {"a": {"enum": [1]}}, "required": ["a"]}
    for attempt in range(2):
        written = await text_of(engine, StructuredOutput(json_schema=json.dumps(schema)), f"long-{attempt}")
        assert written.lstrip().startswith("{")
    assert await text_of(engine, StructuredOutput(regex=".{600}"), "long-regex")


def test_compiled_grammars_are_remembered_within_their_bytes() -> None:
    made: list[str] = []

    class Compiler:
        def compile_regex(self, regex: str) -> SimpleNamespace:
            made.append(regex)
            return SimpleNamespace(memory_size_bytes=40)

    compiler = CachedCompiler(Compiler(), 100)
    for regex in ("a", "b", "a", "c", "a", "b"):
        compiler.compile_regex(regex)
    assert made == ["a", "b", "c", "b"]
