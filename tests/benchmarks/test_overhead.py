"""A part of the study of overhead: a model without its deltas."""

from __future__ import annotations

from torch import nn

from benchmarks.studies.overhead import overrides


def test_overrides_of_a_models_own_methods_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert overrides(model) == []
    model[1].forward = print
    assert [(each.owner, each.name, each.value) for each in overrides(model)] == [(model[1], "forward", print)]
