"""The arithmetic of the studies: what their figures are made of."""

from __future__ import annotations

import random

import pytest
from torch import nn

from benchmarks.steps import row
from benchmarks.studies.interference import Seen, _row
from benchmarks.studies.overhead import overrides


def test_a_difference_is_found_under_noise_that_both_steps_of_a_pair_share() -> None:
    draw = random.Random(0)
    noise = [draw.uniform(0.02, 0.2) for _ in range(400)]
    pairs = [(0.04 + each, 0.04 + each + draw.uniform(0.0019, 0.0021)) for each in noise]
    measured = row("a workload", pairs, "floor")
    assert measured.difference_ms == pytest.approx(2.0, abs=0.02)
    assert measured.ratio == pytest.approx(measured.base_ms / (measured.base_ms + 2.0), abs=1e-3)
    assert measured.low <= measured.ratio <= measured.high
    assert measured.high - measured.low < 0.001


def test_overrides_of_a_models_own_methods_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert overrides(model) == []
    model[1].forward = print
    assert [(each.owner, each.name, each.value) for each in overrides(model)] == [(model[1], "forward", print)]


def seen(calm: float, loud: float, health: float = 0.001) -> Seen:
    """Gaps at every tenth of a second: calm ones in [0, 10) and [20, 30), loud ones between."""
    moments = [n / 10 for n in range(300)]
    return Seen(
        gaps=[(m, loud if 10 <= m < 20 else calm) for m in moments],
        health=[(m, health if 10 <= m < 20 else 0.001) for m in moments],
    )


@pytest.mark.parametrize(
    ("given", "ratio", "kept"),
    [(seen(0.01, 0.014), 1.4, True), (seen(0.01, 0.02), 2.0, False), (seen(0.01, 0.01, health=0.2), 1.0, False)],
)
def test_a_kind_is_compared_with_the_calm_before_and_after_it(given: Seen, ratio: float, kept: bool) -> None:
    row = _row("kind", given, [(0, 9.95), (20, 30)], 10, 19.95, {}, 0)
    assert row.ratio == pytest.approx(ratio)
    assert row.is_kept == kept


def test_a_kind_under_which_a_stream_failed_or_stood_still_is_not_kept() -> None:
    failed = seen(0.01, 0.01)
    failed.failed.append((15.0, "UNAVAILABLE"))
    assert not _row("kind", failed, [(0, 9.95), (20, 30)], 10, 19.95, {}, 0).is_kept
    still = seen(0.01, 0.01)
    still.gaps = [(m, g) for m, g in still.gaps if not 10 <= m < 20]
    assert not _row("kind", still, [(0, 9.95), (20, 30)], 10, 19.95, {}, 0).is_kept
