"""Callers' mistakes, at a real engine: INVALID_ARGUMENT with the field, and the engine serves on."""

from __future__ import annotations

from typing import Any

import pytest

from deltamux.client import Client
from deltamux.errors import InvalidArgumentError
from deltamux_testing.server_process import ServerProcess

MISTAKES: dict[str, dict[str, Any]] = {
    "bias beyond the vocabulary": {"logit_bias": {10_000_000: 1.0}},
    "negative bias id": {"logit_bias": {-1: 1.0}},
    "stop id beyond the vocabulary": {"stop_token_ids": [10_000_000]},
    "a million stop ids": {"stop_token_ids": range(1_000_000)},
    "more tokens than the context": {"min_tokens": 10**9, "fill_context": True},
    "a type that does not exist": {"json_schema": '{"type": "objec"}'},
    "a reference to nothing": {"json_schema": '{"$ref": "#/$defs/none"}'},
    "a reference to itself": {"json_schema": '{"$ref": "#"}'},
    "a schema nested 400 deep": {"json_schema": '{"items": ' * 400 + "{}" + "}" * 400},
    "a regex that does not end": {"regex": "("},
    "a regex with look-ahead": {"regex": "(?=a)b"},
    "a regex with a back reference": {"regex": r"(a)\1"},
    "twenty thousand choices": {"choice": [f"option {n}" for n in range(20_000)]},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_and_the_engine_serves_on(name: str, client: Client, server: ServerProcess) -> None:
    prompt = [5, 17, 99]
    with pytest.raises(InvalidArgumentError) as refused:
        client.generate(prompt, **MISTAKES[name], timeout=20)
    # A message beyond its byte bound is refused before its fields are read.
    field = "request" if name == "a million stop ids" else "sampling."
    assert refused.value.metadata["field"].startswith(field)
    assert len(client.generate(prompt, max_tokens=2, ignore_eos=True, timeout=20).token_ids) == 2
    assert len(server.log()) < 200_000
