"""Structured output is bounded by its shape, tried within a budget of its own, and never holds another's up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil
import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st

from deltamux.engine.base import StructuredOutput
from deltamux.engine.vllm.grammars.admission import Grammars
from deltamux.engine.vllm.grammars.process import Settings
from deltamux.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from deltamux_testing.tiny_base import byte_tokenizer
from deltamux_testing.waiting import until


def schema(**given: Any) -> StructuredOutput:
    return StructuredOutput(json_schema=json.dumps(given))


def wide(outer: int, inner: int) -> StructuredOutput:
    """Objects of optional properties within each other: the grammar grows with the square of their number."""
    leaf = {"type": "object", "properties": {f"q{n}": {"type": "string"} for n in range(inner)}}
    return schema(type="object", properties={f"p{n}": leaf for n in range(outer)})


SMALL = StructuredOutput(regex="[ab]{10}")
SLOW = wide(100, 20)
"""Takes most of a second of CPU time to compile for the vocabulary below."""


@pytest.fixture(scope="module")
def settings() -> Settings:
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_tokens([f"{a}{b}{c}" for a in 'abcdefgh" {' for b in "abcdefgh:,}" for c in "abcdefgh\"' "])
    return Settings(xgrammar.TokenizerInfo.from_huggingface(tokenizer).serialize_json())


@pytest.fixture(scope="module")
async def grammars(settings: Settings) -> AsyncIterator[Grammars]:
    grammars = Grammars(settings, 2.0)
    yield grammars
    await grammars.close()


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"json_schema": '{"$ref": "#"}'}, "never ends"),
        ({"json_schema": '{"$ref": "#/$defs/none"}'}, "does not have"),
        ({"json_schema": '{"$ref": "https://example.com/s.json"}'}, "within the schema"),
        ({"json_schema": '{"properties": {"a": {"$ref": "#"}}, "required": ["a"]}'}, "never ends"),
        ({"json_schema": '{"items": {"$ref": "#"}, "minItems": 1}'}, "never ends"),
        (
            {"json_schema": '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}'},
            "never",
        ),
        ({"json_schema": '{"a":' * 400 + "1" + "}" * 400}, "levels deep"),
        ({"json_schema": "[" * 60_000}, "not valid JSON"),
        ({"json_schema": json.dumps({"properties": {f"{n}": {} for n in range(5000)}})}, "entries at #/properties"),
        ({"json_schema": json.dumps({"enum": list(range(9000))})}, "more than 8192 values"),
        ({"json_schema": '{"type": "string", "maxLength": 1e9}'}, "outside 0 to 1000"),
        ({"json_schema": '{"type": "string", "pattern": "a{100000}"}'}, "repeats"),
        ({"regex": "a{2000}"}, "repeats"),
        ({"regex": "a{1," + "9" * 3000 + "}"}, "repeats"),
        ({"regex": "a" * 5000}, "characters"),
        ({"regex": "\0"}, "NUL"),
        ({"regex": r"x[\ud800-\udfff]"}, "surrogate"),
        ({"regex": r"\\\uDC00"}, "surrogate"),
        ({"choice": tuple(f"{n}" for n in range(20_000))}, "options"),
        ({"choice": ("a" * 2000,)}, "option of more"),
    ],
)
def test_what_is_too_large_or_never_ends_is_refused_by_its_shape(given: Any, what: str) -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidArgumentError, match=what) as refused:
        StructuredOutput(**given)
    assert refused.value.metadata["field"].startswith("sampling.structured_output.")
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    "given",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
        {"properties": {"$ref": {"type": "string"}, "enum": {"type": "string"}}},
        {"$defs": {"a": {"type": "integer"}}, "items": {"$ref": "#/$defs/a"}, "minItems": 2},
    ],
)
def test_a_cycle_that_can_end_is_taken(given: dict[str, Any]) -> None:
    schema(**given)


names = st.sampled_from(["properties", "$ref", "anyOf", "items", "required", "type", "minItems", "a", "b"])
leaves = st.sampled_from(["#", "#/a", "#/$defs/x", "object", "string", "a", 1, -1, True, None, 1e400])
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=4), max_leaves=30)


@given(st.dictionaries(names, values, max_size=5))
def test_any_json_is_taken_or_refused_as_an_argument(given: dict[str, Any]) -> None:
    with suppress(InvalidArgumentError):
        StructuredOutput(json_schema=json.dumps(given))


@pytest.mark.parametrize(
    "structured_output",
    [
        SMALL,
        StructuredOutput(choice=('yes "indeed"', "no", "ünïcode\n")),
        StructuredOutput(choice=tuple(f"option {n}" for n in range(1000))),
        StructuredOutput(regex=r"\d{4}-\d{2}"),
        StructuredOutput(regex=r"\\ud800\ud7ff\u{d8}"),  # a backslash as text
        schema(type="object", properties={"a": {"type": "string"}, "b": {"type": "integer"}}, required=["a", "b"]),
    ],
)
async def test_common_grammars_are_admitted_and_cached(structured_output: StructuredOutput, grammars: Grammars) -> None:
    first = await grammars.admit(structured_output, "acme")
    tried = next(grammars._process._numbers)
    assert await grammars.admit(structured_output, "globex") == first
    assert next(grammars._process._numbers) == tried + 1


@pytest.mark.parametrize(
    ("structured_output", "words"),
    [
        (StructuredOutput(regex="("), ""),
        (StructuredOutput(regex="(?=a)b"), ""),
        (StructuredOutput(regex=r"(a)\1"), ""),
        (schema(type="objec"), ""),
        (schema(type="array", uniqueItems=True), ""),
        (schema(enum=[]), ""),
        (schema(type="integer", minimum=1e30), ""),
        # What xgrammar alone would only warn of.
        (StructuredOutput(regex="a^b"), "'^' should be at the start"),
        (StructuredOutput(regex="a$b"), "'$' should be at the end"),
        (StructuredOutput(regex=r"\Aa"), r"'\A' is not recognized"),
        (schema(type="string", pattern="(?!a)b"), "Lookahead assertion"),
        (schema(oneOf=[{"type": "integer"}, {"type": "number"}]), "oneOf with overlapping"),
    ],
)
async def test_what_cannot_be_used_is_refused_with_its_field(
    structured_output: StructuredOutput, words: str, grammars: Grammars
) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        await grammars.admit(structured_output, "acme")
    assert refused.value.reason == "INVALID_GRAMMAR", refused.value.message
    assert refused.value.metadata["field"].startswith("sampling.structured_output.")
    assert words in refused.value.message
    assert ".cc" not in refused.value.message, "it names no file of xgrammar's"
    await grammars.admit(SMALL, "acme")


async def test_an_escape_that_every_dialect_reads_alike_is_taken(grammars: Grammars) -> None:
    await grammars.admit(StructuredOutput(regex=r"\_\-\@"), "acme")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [{"grammar_bytes": 100_000}, {"step_seconds": 1e-9}, {"memory_bytes": 1 << 20}])
async def test_a_grammar_beyond_its_size_or_its_cost_per_token_is_refused(
    limit: Any, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars._process, "settings", replace(grammars._process.settings, **limit))
    with pytest.raises(InvalidArgumentError) as refused:
        await grammars.admit(wide(64, 10 + len(str(limit))), "acme")
    assert refused.value.reason == "GRAMMAR_TOO_COMPLEX"


@pytest.mark.slow
async def test_grammars_beyond_their_budget_are_refused_and_hold_no_other_group_up(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    await grammars.admit(SMALL, "globex")  # the process has started
    monkeypatch.setattr(grammars, "_seconds", 0.1)
    greedy = [asyncio.create_task(grammars.admit(wide(80 + n, 20), "acme")) for n in range(20)]
    await asyncio.sleep(0.01)
    for number in range(5):
        started = time.perf_counter()
        await grammars.admit(StructuredOutput(regex=f"[cd]{{{number + 1}}}"), "globex")
        assert time.perf_counter() - started < 5.0
    assert not all(task.done() for task in greedy)
    reasons = {error.reason for error in await asyncio.gather(*greedy, return_exceptions=True)}  # type: ignore[union-attr]  # all fail
    assert reasons == {"GRAMMAR_TOO_COMPLEX"}


async def test_cancelling_ends_the_work_at_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    await grammars.admit(SMALL, "acme")
    assert grammars._process.pid is not None
    process = psutil.Process(grammars._process.pid)
    slow = asyncio.create_task(grammars.admit(SLOW, "acme"))
    await until(process.children)
    process.children()[0].suspend()  # it ends by being ended, and not before
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    await until(lambda: not process.children(), seconds=10)
    await grammars.admit(StructuredOutput(regex="[ab]{11}"), "acme")


@pytest.mark.slow
async def test_one_group_may_have_so_many_waiting_and_equal_ones_count_once(grammars: Grammars) -> None:
    many = [grammars.admit(StructuredOutput(regex=f"a{{{n + 1}}}"), "acme") for n in range(60)]
    same = [grammars.admit(StructuredOutput(regex="[ef]{10}"), "globex") for _ in range(200)]
    outcomes = await asyncio.gather(*many, *same, return_exceptions=True)
    assert not [outcome for outcome in outcomes[60:] if isinstance(outcome, BaseException)]
    refused = [outcome for outcome in outcomes[:60] if isinstance(outcome, BaseException)]
    assert refused
    assert all(isinstance(outcome, ResourceExhaustedError) and outcome.retry_after for outcome in refused)


@pytest.mark.slow
async def test_grammars_start_another_process_after_one_is_killed(grammars: Grammars) -> None:
    await grammars.admit(SMALL, "acme")
    slow = asyncio.create_task(grammars.admit(SLOW, "acme"))
    await asyncio.sleep(0.02)
    assert grammars._process.pid is not None
    psutil.Process(grammars._process.pid).kill()
    with pytest.raises(UnavailableError):
        await slow
    await grammars.admit(StructuredOutput(regex="[ab]{12}"), "acme")
