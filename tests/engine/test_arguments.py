"""What vLLM would refuse of an engine's options is refused before vLLM is imported, in one sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pydantic
import pytest

from deltamux.engine.arguments import argument_names, in_a_sentence, longest_context


def test_the_names_that_are_checked_are_those_of_the_vllm_that_is_installed() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert argument_names() == {field.name for field in dataclasses.fields(AsyncEngineArgs)}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024, "n_ctx": 512}, 1024),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 8, "rope_parameters": {"full_attention": {"factor": 2}}}, 16),
        ({"model_type": "mamba"}, None),
    ],
)
def test_a_context_is_never_taken_for_shorter_than_vllm_takes_it(
    config: dict[str, Any], longest: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert longest_context(str(tmp_path)) == longest


def test_an_error_of_many_lines_becomes_one_line() -> None:
    class Config(pydantic.BaseModel):
        size: int
        name: str

    with pytest.raises(pydantic.ValidationError) as raised:
        Config(size="many", name=["a"])  # type: ignore[arg-type]  # as an operator might
    message = in_a_sentence(raised.value)
    assert message.startswith("size: Input should be a valid integer")
    assert message.endswith("; name: Input should be a valid string")
