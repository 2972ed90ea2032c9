"""Virtual tokens whose keys and values are known are written into the cache, and never computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltamux.conformance.parity import assert_same, served
from deltamux.deltas import BaseModel, Program
from deltamux.engine.base import ProgramRef
from deltamux.engine.vllm.frontend import translate
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.engine.vllm.prefixes import known_prefix, known_tokens, slot_mapping
from deltamux_testing import random_programs

PREFIX, PROMPT = 6, (5, 6, 7)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many of a request's tokens vLLM did not compute, as it tells with every output."""
    seen: list[int] = []
    chunk = translate.chunk

    def seeing(output: Any, *args: Any) -> Any:
        seen.append(output.num_cached_tokens or 0)
        return chunk(output, *args)

    monkeypatch.setattr(translate, "chunk", seeing)
    return seen


async def test_a_prefix_of_keys_and_values_is_not_computed(
    engine: VLLMEngine, base: BaseModel, tmp_path: Path, cached: list[int]
) -> None:
    ref = random_programs.saved(random_programs.prefix(base, 900, PREFIX), tmp_path, "known")
    first = await served(engine, PROMPT, ref, 6, "known-first")
    assert set(cached) == {PREFIX}
    assert_same(first, await served(engine, PROMPT, ref, 6, "known-again"))


async def test_a_soft_prompt_is_computed_since_only_its_embeddings_are_known(
    engine: VLLMEngine, base: BaseModel, tmp_path: Path, cached: list[int]
) -> None:
    ref = random_programs.saved(random_programs.soft_prompt(base, 901, PREFIX), tmp_path, "soft")
    await served(engine, PROMPT, ref, 6, "soft")
    assert set(cached) == {0}


def test_a_program_that_leaves_a_layer_without_a_prefix_has_it_computed(base: BaseModel, tmp_path: Path) -> None:
    whole = random_programs.prefix(base, 902, PREFIX)
    partial = Program.of(whole.placements[1:])
    assert known_prefix(whole, base) is not None
    assert known_prefix(partial, base) is None
    assert known_tokens(random_programs.saved(whole, tmp_path, "whole"), base) == PREFIX
    assert known_tokens(random_programs.saved(partial, tmp_path, "partial"), base) == 0


def test_a_program_whose_file_is_gone_has_its_prefix_computed(base: BaseModel, tmp_path: Path) -> None:
    assert known_tokens(ProgramRef("gone", tmp_path / "gone.safetensors", PREFIX), base) == 0


def test_a_prefix_is_in_the_cache_where_the_block_table_points() -> None:
    assert slot_mapping(np.array([7, 2, 9], dtype=np.int32), 4, 6).tolist() == [28, 29, 30, 31, 8, 9]
