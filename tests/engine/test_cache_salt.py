"""The prefix cache is shared by requests of the same salt alone, so that its hits reveal no other tenant's prompts."""

from __future__ import annotations

import pytest

from deltamux.engine.base import ProgramRef, SamplingOptions
from deltamux.engine.vllm.frontend.engine import VLLMEngine

PROMPT = tuple(range(5, 165))
"""Five blocks of the engine's cache."""


@pytest.mark.parametrize("program", [None, "low-rank", "prefix"])
async def test_cached_tokens_are_of_the_same_salt_alone(
    program: str | None, engine: VLLMEngine, programs: dict[str, ProgramRef]
) -> None:
    async def cached(salt: str) -> tuple[int, tuple[int, ...]]:
        adapter = programs[program] if program else None
        chunks = engine.generate(
            PROMPT,
            SamplingOptions(max_tokens=4, temperature=0.0, ignore_eos=True),
            adapter,
            request_id=f"{program}-{salt}-{len(seen)}",
            stream=False,
            cache_salt=salt,
        )
        [chunk] = [chunk async for chunk in chunks]
        seen.append(salt)
        return chunk.cached_tokens, chunk.token_ids

    seen: list[str] = []
    first, expected = await cached(f"tenants/acme-{program}")
    again, tokens = await cached(f"tenants/acme-{program}")
    assert (first, tokens) == (0, expected)
    assert again >= 96
    other, tokens = await cached(f"tenants/globex-{program}")
    assert (other, tokens) == (0, expected)
    assert (await cached(""))[0] == 0
