"""Requests of any mix of programs, drawn at random, and one such request served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from deltamux.conformance.parity import Greedy, served
from deltamux.engine.base import Engine, ProgramRef

NAMES = (
    "low-rank",
    "low-rank-wide",
    "low-rank-other",
    "bottleneck",
    "bottleneck-parallel",
    "bottleneck-residual",
    "prefix",
    "prefix-long",
    "bias",
    "scale",
    "soft-prompt",
    "everything",
)
Request = tuple[str | None, tuple[int, ...], int]
"""Program, prompt, tokens to generate."""
serial = iter(range(1_000_000))


def requests(names: Sequence[str] = NAMES, most: int = 12, most_tokens: int = 12) -> st.SearchStrategy[list[Request]]:
    prompts = st.lists(st.integers(3, 255), min_size=1, max_size=60).map(tuple)
    one = st.tuples(st.sampled_from((None, *names)), prompts, st.integers(1, most_tokens))
    return st.lists(one, min_size=2, max_size=most)


async def run(engine: Engine, programs: Mapping[str, ProgramRef], request: Request) -> Greedy:
    name, prompt, num_tokens = request
    program = programs[name] if name else None
    return await served(engine, prompt, program, num_tokens, f"request-{next(serial)}")
