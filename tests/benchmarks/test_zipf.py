"""How the time of steps is shared out."""

from __future__ import annotations

import random

import pytest

from benchmarks.studies.zipf import Step, account


def test_what_adapters_cost_is_found_under_noise_that_neighbouring_steps_share() -> None:
    draw = random.Random(0)
    rounds = []
    for _ in range(3):
        noise = [draw.uniform(0, 0.1) for _ in range(100)]
        pairs = [(Step(False, 32, 32, 26, 1, 0.002, 0.03 + n, 0.001), n) for n in noise]
        rounds.append([s for bare, n in pairs for s in (bare, bare._replace(with_adapters=True, model=0.034 + n))])
    row = account("many", 32, rounds)
    assert row.adapters_ms == pytest.approx(4.0, abs=0.01)
    assert (row.rows, row.adapters, row.arrived) == (32, 26, 1)
    assert row.arriving_ms == pytest.approx(2.0)
    assert row.between_ms == pytest.approx(1.0)
    assert row.ms_per_token == pytest.approx((row.base_ms + 7.0) / 32, abs=0.001)


def test_steps_with_prompts_in_them_are_not_compared() -> None:
    bare = Step(False, 8, 8, 8, 0, 0.0, 0.03, 0.0)
    prompt = bare._replace(with_adapters=True, tokens=64, model=0.2)
    row = account(
        "many", 8, [[bare, prompt, bare._replace(tokens=64, model=0.09), bare, prompt._replace(tokens=8, model=0.031)]]
    )
    assert row.adapters_ms == pytest.approx(1.0)
    assert row.base_ms == pytest.approx(30.0)
