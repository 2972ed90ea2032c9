"""Ops of plugins whose batches call their hooks by former names are served as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltamux.conformance.cases import base_directory
from deltamux.deltas import BaseModel, Program
from deltamux.deltas.batched_check import check_batched
from deltamux.deltas.ops import OpBatch, RowRange, StepIndex, op_class
from deltamux_testing.third_party import install

EDIT = Path(__file__).parents[2] / "plugins" / "examples" / "red" / "deltamux_red" / "edit.py"
DEPRECATED = r"EditBatch\._(place|clear) is called _(set|reset) now"


def test_an_op_written_with_the_former_names_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = EDIT.read_text()
    former = source.replace("def _set(", "def _place(").replace("def _reset(", "def _clear(")
    monkeypatch.syspath_prepend(install(tmp_path, {"edit": former}, value=":Edit", group="deltamux.ops"))
    with pytest.warns(DeprecationWarning, match=DEPRECATED) as warned:
        edit = op_class("edit")
    assert len(warned) == 2
    base = BaseModel.from_pretrained(base_directory("llama"))
    parameters = {"factor": torch.full((base.dims.hidden_size,), 2.0), "bias": torch.ones(base.dims.hidden_size)}
    check_batched(Program.of([(base.blocks[0].name, edit.of(parameters, {}))]).placed(base))


def test_a_subclass_may_call_the_former_names_of_its_base_class() -> None:
    bias = op_class("bias")
    calls = []

    with pytest.warns(DeprecationWarning, match=r"_place is called _set now"):

        class Counted(bias.batch):  # type: ignore[name-defined, misc]  # a class that is a value
            def _place(self, slot: int, op: object) -> None:
                calls.append(slot)
                super()._place(slot, op)

    base = BaseModel.from_pretrained(base_directory("llama"))
    site = base.linears[0]
    batch: OpBatch = Counted(site, 2, torch.float32, "cpu")
    batch.place(1, bias.of({"bias": torch.ones(site.out_features)}, {}))
    y = torch.zeros(3, site.out_features)
    batch.apply(torch.zeros(3, site.in_features), y, StepIndex((RowRange(1, 0, 2),), 3, 2))
    assert calls == [1]
    assert y.sum(1).tolist() == [site.out_features, site.out_features, 0]
