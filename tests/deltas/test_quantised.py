"""The values of weights that a base's checkpoint stores in 8 bits; packed ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from deltamux.deltas import BaseModel
from deltamux.deltas.weights import WeightFiles
from deltamux.errors import QuantisedBaseError
from deltamux_testing.quantised_bases import write_quantised

NAME = "model.q_proj.weight"


def files(directory: Path, tensors: dict[str, Tensor]) -> WeightFiles:
    save_file(tensors, directory / "model.safetensors")
    return WeightFiles.locate(directory)


def test_dora_and_oft_read_the_values_of_a_quantised_base(base_directory: Path, tmp_path: Path) -> None:
    plain = BaseModel.from_pretrained(write_quantised(base_directory, tmp_path / "int8", "int8"))
    quantised = BaseModel.from_pretrained(tmp_path / "int8")
    for site in plain.linears:
        assert torch.equal(quantised.tensor(f"{site.name}.weight"), plain.tensor(f"{site.name}.weight"))


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    symmetric=st.booleans(),
    first=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_codes_times_the_scale_of_their_block_are_the_values(
    rows: int,
    columns: int,
    block: tuple[int, int],
    symmetric: bool,
    first: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows * block[0], columns * block[1]), generator=random).to(torch.int8)
    scale = torch.rand(rows, columns, generator=random)
    zeros = torch.randint(-8, 8, (rows, columns), generator=random).to(torch.int8)
    stored = {NAME: codes, f"{NAME}_scale": scale} | ({} if symmetric else {f"{NAME}_zero_point": zeros})
    found = files(tmp_path_factory.mktemp("codes"), stored)
    expanded, zero = (t.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1) for t in (scale, zeros))
    expected = (codes.float() - (0 if symmetric else zero)) * expanded
    assert torch.equal(found.read(NAME), expected)
    first = min(first, len(codes) - 1)
    assert torch.equal(found.rows(NAME, first, len(codes)), expected[first:])


def test_one_scale_per_tensor_and_one_per_row_are_known(tmp_path: Path) -> None:
    codes = torch.tensor([[1.0, -2.0], [3.0, 4.0]]).to(torch.float8_e4m3fn)
    for name, scale in {
        "scalar": torch.tensor(0.5),
        "one": torch.tensor([0.5]),
        "inverse": torch.tensor([[0.5]]),
    }.items():
        (tmp_path / name).mkdir()
        suffix = "_scale_inv" if name == "inverse" else "_scale"
        found = files(tmp_path / name, {NAME: codes, NAME + suffix: scale})
        assert torch.equal(found.read(NAME), codes.float() / 2)
    (tmp_path / "rows").mkdir()
    found = files(tmp_path / "rows", {NAME: codes, f"{NAME}_scale": torch.tensor([0.5, 2.0])})
    assert torch.equal(found.read(NAME), torch.tensor([[0.5, -1.0], [6.0, 8.0]]))


@pytest.mark.parametrize(
    ("tensors", "how"),
    [
        ({"model.q_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)}, "packed in model.q_proj.qweight"),
        ({"model.q_proj.weight_packed": torch.zeros(2, 2, dtype=torch.int32)}, "packed in model.q_proj.weight_packed"),
        ({NAME: torch.zeros(4, 1, dtype=torch.uint8), f"{NAME}.absmax": torch.zeros(1)}, "packed, with"),
        ({NAME: torch.zeros(2, 2, dtype=torch.int8)}, "int8 without a known scale"),
        ({NAME: torch.zeros(3, 2, dtype=torch.int8), f"{NAME}_scale": torch.zeros(2, 1)}, "blocks of several sizes"),
    ],
    ids=["AWQ or GPTQ", "compressed-tensors", "bitsandbytes", "no scale", "uneven blocks"],
)
def test_values_that_cannot_be_read_are_refused_with_the_form(
    tensors: dict[str, Tensor], how: str, tmp_path: Path
) -> None:
    found = files(tmp_path, tensors)
    with pytest.raises(QuantisedBaseError, match=how):
        found.read(NAME)
    with pytest.raises(QuantisedBaseError, match=how):
        found.rows(NAME, 0, 1)
