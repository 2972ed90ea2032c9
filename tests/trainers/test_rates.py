"""The default learning rate: that of its source on the source's width, scaled by one over the width elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltamux.registry import Registry
from deltamux_trainers import TrainOptions
from deltamux_trainers.options import default_rate


@pytest.mark.parametrize(
    ("method", "hidden_size", "expected"),
    [
        ("lora", 4096, 2e-4),
        ("lora", 8192, 1e-4),  # as QLoRA's table 9 has it
        ("lora", 512, 1.6e-3),
        ("lora", 64, 3.2e-3),
        ("lora", 65536, 5e-5),
        ("ia3", 64, 3e-3),
        ("prompt", 8192, 3e-2),
    ],
)
def test_rates_of_matrices_go_with_one_over_the_width_and_those_of_vectors_stay(
    method: str, hidden_size: int, expected: float
) -> None:
    assert default_rate(Registry().get(method).info, hidden_size) == pytest.approx(expected)


def test_a_given_learning_rate_is_used() -> None:
    options = TrainOptions(method="lora", model="", data=Path(), output=Path(), learning_rate=0.5)
    assert options.rate(Registry().get("lora").info, 64) == 0.5
