"""Programs and their compiled files; the fingerprint of a base."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from deltamux.deltas import (
    BaseModel,
    Bias,
    Bottleneck,
    Checkpoint,
    Dense,
    KVPrefix,
    LowRank,
    NormAffine,
    Op,
    Program,
    Scale,
    ScaleInput,
    SoftPrompt,
)
from deltamux.deltas.activations import ACTIVATIONS
from deltamux.errors import BaseMismatchError, FailedPreconditionError, InvalidAdapterError
from deltamux_testing import random_programs


def test_a_compiled_file_holds_the_whole_program(base: BaseModel, tmp_path: Path) -> None:
    program = random_programs.everything(base, 1)
    program.save(tmp_path / "program.safetensors")
    loaded = Program.load(tmp_path / "program.safetensors")
    assert loaded.num_virtual_tokens == program.num_virtual_tokens == 3
    for written, read in zip(program, loaded, strict=True):
        assert (read.site, type(read.op), read.op.attributes()) == (
            written.site,
            type(written.op),
            written.op.attributes(),
        )
        for name, tensor in written.op.tensors().items():
            assert torch.equal(read.op.tensors()[name], tensor)


seeds = st.integers(0, 10_000)
ops = st.one_of(
    st.builds(
        lambda s, r, x: LowRank(draw(s, r, 4), draw(s + 1, 6, r), x, 0.1), seeds, st.integers(1, 4), st.floats(-4, 4)
    ),
    st.builds(lambda s: Dense(draw(s, 6, 4)), seeds),
    st.builds(lambda s: Scale(draw(s, 6)), seeds),
    st.builds(lambda s: ScaleInput(draw(s, 4)), seeds),
    st.builds(lambda s: Bias(draw(s, 6)), seeds),
    st.builds(lambda s, b: NormAffine(draw(s, 4), draw(s + 1, 4) if b else None), seeds, st.booleans()),
    st.builds(
        lambda s, b, a, p: Bottleneck(
            draw(s, 2, 4), draw(s, 4, 2), draw(s, 2) if b else None, draw(s, 4) if not b else None, a, 0.5, p, not p
        ),
        seeds,
        st.booleans(),
        st.sampled_from(sorted(ACTIVATIONS)),
        st.booleans(),
    ),
    st.builds(lambda s: KVPrefix(draw(s, 3, 1, 4), draw(s + 1, 3, 1, 4)), seeds),
)
"""Ops of every kind that one program may hold together."""
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def has_one_prefix_per_site(rows: list[tuple[str, Op]]) -> bool:
    fronts = [site for site, op in rows if op.virtual_tokens()]
    return len(fronts) == len(set(fronts))


programs = st.lists(st.tuples(st.text(min_size=1, max_size=12), ops), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(rows=programs.filter(has_one_prefix_per_site), dtype=dtypes)
def test_any_program_comes_back_from_its_compiled_file_bit_for_bit(
    rows: list[tuple[str, Op]], dtype: torch.dtype
) -> None:
    program = Program.of(rows).to(dtype)
    with tempfile.TemporaryDirectory() as base_directory:
        program.save(Path(base_directory) / "program")
        loaded = Program.load(Path(base_directory) / "program")
    assert loaded.num_virtual_tokens == program.num_virtual_tokens
    assert [(site, type(op), op.attributes()) for site, op in loaded] == [
        (site, type(op), op.attributes()) for site, op in program
    ]
    for (_, written), (_, read) in zip(program, loaded, strict=True):
        assert written.tensors().keys() == read.tensors().keys()
        assert all(
            torch.equal(t, read.tensors()[n]) and t.dtype == read.tensors()[n].dtype
            for n, t in written.tensors().items()
        )


def test_a_soft_prompt_comes_back_from_its_compiled_file(tmp_path: Path) -> None:
    program = Program.of([("embed", SoftPrompt(draw(1, 5, 4)))])
    program.save(tmp_path / "program")
    loaded = Program.load(tmp_path / "program")
    assert loaded.num_virtual_tokens == 5
    assert torch.equal(loaded.placements[0].op.tensors()["embedding"], draw(1, 5, 4))


@pytest.mark.parametrize(
    ("metadata", "gone"),
    [
        ({"rows": "{"}, None),
        ({"rows": "[{}]"}, None),
        ({"num_virtual_tokens": "many"}, None),
        ({"format": "deltamux.program/0"}, None),
        ({}, "0.a"),
        ({}, "0."),
    ],
)
def test_a_damaged_compiled_file_is_refused_by_name(
    metadata: dict[str, str], gone: str | None, base: BaseModel, tmp_path: Path
) -> None:
    random_programs.low_rank(base, 1).save(tmp_path / "program")
    with safe_open(tmp_path / "program", framework="pt") as file:
        header: dict[str, str] = file.metadata()
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    kept = {name: t for name, t in tensors.items() if gone is None or not name.startswith(gone)}
    save_file(kept, tmp_path / "program", metadata={**header, **metadata})
    with pytest.raises(InvalidAdapterError, match=str(tmp_path)):
        Program.load(tmp_path / "program")


def test_a_compiled_file_whose_tensors_are_not_aligned_is_refused_by_name(base: BaseModel, tmp_path: Path) -> None:
    random_programs.low_rank(base, 1).save(path := tmp_path / "program")
    written = path.read_bytes()
    header = written[8 : (end := 8 + int.from_bytes(written[:8], "little"))] + b" "
    path.write_bytes(len(header).to_bytes(8, "little") + header + written[end:])
    with pytest.raises(InvalidAdapterError, match=r"damaged.* at a multiple of 4 bytes"):
        Program.load(path)


def test_a_program_for_another_base_is_refused_by_its_first_wrong_shape(base: BaseModel) -> None:
    with pytest.raises(BaseMismatchError, match=r"low_rank\.a at model\.layers\.0.* has shape \[4, 128\]"):
        random_programs.for_another_base(base).placed(base)


def test_a_site_that_the_base_lacks_is_named(base: BaseModel) -> None:
    with pytest.raises(BaseMismatchError, match=r"no linear site 'model\.layers\.9\.mlp\.up_proj'"):
        Program.of([("model.layers.9.mlp.up_proj", LowRank(torch.zeros(1, 64), torch.zeros(128, 1)))]).placed(base)


PREFIX, LONGER = (KVPrefix(torch.zeros(n, 1, 32), torch.zeros(n, 1, 32)) for n in (1, 2))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([("layers.0.attention", PREFIX), ("layers.1.attention", LONGER)], "equally long"),
        ([("layers.0.attention", PREFIX)] * 2, "two ops with virtual tokens are at one site"),
        ([], "changes nothing"),
    ],
    ids=["prefixes of unequal length", "two prefixes at one site", "no ops"],
)
def test_ops_that_make_no_program_are_refused(rows: list[tuple[str, Op]], problem: str) -> None:
    with pytest.raises(InvalidAdapterError, match=problem):
        Program.of(rows)


def test_a_value_that_is_finite_in_float32_only_is_found_after_the_cast(base: BaseModel) -> None:
    program = Program.of([(base.linears[0].name, LowRank(torch.full((1, 64), 1e6), torch.zeros(64, 1)))])
    program.check_finite()
    with pytest.raises(InvalidAdapterError, match=r"not finite in torch\.float16"):
        program.to(torch.float16).check_finite()


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 1e38])
def test_a_scale_that_makes_finite_factors_overflow_is_found(scale: float) -> None:
    factors = LowRank(torch.ones(1, 4), torch.full((4, 1), 1e3), scale)
    bottleneck = Bottleneck(torch.ones(1, 4), torch.full((4, 1), 1e3), scale=scale)
    for name, op in (("low_rank", factors), ("bottleneck", bottleneck)):
        with pytest.raises(InvalidAdapterError, match=rf"{name}\.scale.* at some\.site") as refused:
            Program.of([("some.site", op)]).check_finite()
        assert refused.value.reason == "NOT_FINITE"


def test_a_base_keeps_its_fingerprint_in_bfloat16_and_loses_it_with_other_weights(
    base_directory: Path, base: BaseModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_directory)
    model.bfloat16().save_pretrained(tmp_path / "bfloat16")
    assert BaseModel.from_pretrained(tmp_path / "bfloat16").fingerprint == base.fingerprint
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.5)
    model.save_pretrained(tmp_path / "changed")
    assert BaseModel.from_pretrained(tmp_path / "changed").fingerprint != base.fingerprint


def test_a_fifo_or_a_missing_file_is_refused_without_reading(tmp_path: Path) -> None:
    import os

    with pytest.raises(InvalidAdapterError, match=r"has no adapter_config\.json"):
        Checkpoint.read(tmp_path)
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(InvalidAdapterError, match="not a regular file"):
        Checkpoint.read(tmp_path)


SPOILT_CONFIGS: dict[str, Any] = {
    "a hidden size that its heads do not divide": {"hidden_size": 65},
    "no heads": {"num_attention_heads": 0},
    "a text for a number": {"vocab_size": "x"},
    "rotary positions without their factor": {"rope_parameters": {"rope_type": "yarn"}},
    "rotary positions of a kind that is not known": {"rope_parameters": {"rope_type": "nope"}},
    "an activation that is not known": {"hidden_act": "nope"},
    "a padding token beyond the vocabulary": {"pad_token_id": 1_000_000},
    "nothing": None,
}


@pytest.mark.parametrize("spoilt", SPOILT_CONFIGS)
def test_a_config_that_transformers_cannot_use_is_refused_in_a_sentence(
    spoilt: str, base_directory: Path, tmp_path: Path
) -> None:
    values = SPOILT_CONFIGS[spoilt]
    config = json.loads((base_directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values and config | values))
    with pytest.raises(FailedPreconditionError, match=r"base model .*config\.json") as refused:
        BaseModel.from_pretrained(tmp_path)
    assert "\n" not in refused.value.message
    assert refused.value.reason in {"BASE_NOT_FOUND", "UNSUPPORTED_BASE"}
