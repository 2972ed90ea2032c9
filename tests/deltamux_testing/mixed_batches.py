"""Requests of any mix of programs, drawn at random, and one such request served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hypothesis import strategies as st

from deltamux.conformance.parity import Greedy, served
from deltamux.deltas import BaseModel, Program
from deltamux.engine.base import Engine, ProgramRef
from deltamux_testing import random_programs

PROGRAMS: dict[str, Callable[[BaseModel], Program]] = {
    "low-rank": lambda base: random_programs.low_rank(base, 1),
    "low-rank-wide": lambda base: random_programs.low_rank(base, 2, rank=16),
    "low-rank-other": lambda base: random_programs.low_rank(base, 3),
    "bottleneck": lambda base: random_programs.bottleneck(base, 4),
    "bottleneck-parallel": lambda base: random_programs.bottleneck(base, 5, parallel=True, activation="gelu"),
    "bottleneck-residual": lambda base: random_programs.bottleneck(base, 12, residual=True),
    "prefix": lambda base: random_programs.prefix(base, 6),
    "prefix-long": lambda base: random_programs.prefix(base, 7, length=40),
    "bias": lambda base: random_programs.bias(base, 8),
    "scale": lambda base: random_programs.scale(base, 10),
    "soft-prompt": lambda base: random_programs.soft_prompt(base, 11, length=30),
    "everything": lambda base: random_programs.everything(base, 9),
}
"""One program of every kind, and the same kinds of other tenants."""

NAMES = tuple(PROGRAMS)
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
