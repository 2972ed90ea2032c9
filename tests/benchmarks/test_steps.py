"""The arithmetic of steps that alternate."""

from __future__ import annotations

import random

import pytest

from benchmarks.steps import row


def test_a_difference_is_found_under_noise_that_both_steps_of_a_pair_share() -> None:
    draw = random.Random(0)
    noise = [draw.uniform(0.02, 0.2) for _ in range(400)]
    pairs = [(0.04 + each, 0.04 + each + draw.uniform(0.0019, 0.0021)) for each in noise]
    measured = row("a workload", pairs, "floor")
    assert measured.difference_ms == pytest.approx(2.0, abs=0.02)
    assert measured.ratio == pytest.approx(measured.base_ms / (measured.base_ms + 2.0), abs=1e-3)
    assert measured.low <= measured.ratio <= measured.high
    assert measured.high - measured.low < 0.001
