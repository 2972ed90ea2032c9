"""Parts of the studies of overhead: engines that alternate, and a model without its deltas."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from torch import nn

from benchmarks.studies import alternating_engines
from benchmarks.studies.alternating_engines import SEQUENCES, Burst, BurstSchedule, labels, pairs
from benchmarks.studies.overhead import overrides


@pytest.fixture
def pipes(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in "ab"]
    for pipe in made:
        os.mkfifo(pipe)
    return made


def test_sides_run_bursts_alternately_and_the_last_goes_on_alone(
    pipes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternating_engines, "PATIENCE_SECONDS", 0.5)
    order: list[str] = []
    one, other = pipes
    first, second = BurstSchedule(one, other, 3), BurstSchedule(other, one, 3)

    def run(name: str, schedule: BurstSchedule, steps: int) -> None:
        for _ in range(steps):
            schedule.begin(SEQUENCES)
            order.append(name)

    os.write(os.open(one, os.O_RDWR), b"x")
    threads = [threading.Thread(target=run, args=args) for args in (("a", first, 7), ("b", second, 13))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert "".join(order) == "aaabbbaaabbba" + "b" * 7
    assert [burst.tokens for burst in first.bursts] == [SEQUENCES] * 2
    assert len(second.bursts) == 4


def test_only_bursts_in_which_every_request_generated_are_compared() -> None:
    whole, prompts = Burst(0.4, SEQUENCES), Burst(0.9, 8)
    assert pairs([prompts, whole, whole], [whole, Burst(0.6, SEQUENCES), prompts], 2) == [(0.2, 0.3)]


def test_a_side_that_is_there_again_is_numbered() -> None:
    assert labels(["vllm", "deltamux", "vllm"]) == ["vllm", "deltamux", "vllm (2)"]


def test_overrides_of_a_models_own_methods_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert overrides(model) == []
    model[1].forward = print
    assert [(each.owner, each.name, each.value) for each in overrides(model)] == [(model[1], "forward", print)]
