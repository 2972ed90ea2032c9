"""Compression of full fine-tunings, and its reported error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltamux.conformance.bases import save_base
from deltamux.deltas import BaseModel
from deltamux.deltas.ops.sign_dense import pack_signs, unpack_signs
from deltamux.errors import FailedPreconditionError, InvalidAdapterError, InvalidArgumentError
from deltamux_testing.adapters import read_program, write_own
from deltamux_testing.training import logits
from deltamux_trainers import compress, merge


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture(scope="module")
def adapter(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own("full", BaseModel.from_pretrained(directory), tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("features", [1, 7, 8, 9, 64])
def test_signs_survive_packing(features: int) -> None:
    weight = torch.randn(5, features)
    packed = pack_signs(weight)
    assert packed.shape == (5, -(-features // 8))
    torch.testing.assert_close(unpack_signs(packed, features, torch.float32), torch.where(weight >= 0, 1.0, -1.0))


@pytest.mark.parametrize(("form", "rank"), [("bitdelta", 1), ("svd", 4)])
def test_the_reported_error_is_the_error(form: str, rank: int, directory: Path, adapter: Path, tmp_path: Path) -> None:
    result = compress(str(directory), adapter, tmp_path / "small", form=form, rank=rank)
    base = BaseModel.from_pretrained(directory)
    before, after = load_file(adapter / "adapter_model.safetensors"), read_program(tmp_path / "small", base)
    difference = size = 0.0
    for site, op in after:
        if op.name in ("sign_dense", "low_rank"):
            linear: Any = base.site(op.site_kind, site)
            change = before[f"{site}.weight"].double()
            own: Any = op
            signs = form == "bitdelta"
            small = own.weight(linear.in_features, torch.float64) if signs else own.b.double() @ own.a.double()
            difference, size = difference + float((change - small).square().sum()), size + float(change.square().sum())
    assert result.error == pytest.approx((difference / size) ** 0.5, rel=1e-4)
    assert 0.1 < result.error <= result.worst_error < 1.0
    report = json.loads((tmp_path / "small" / "compress_report.json").read_text())
    assert len(report["errors"]) == result.matrices == len(base.linears)
    assert result.bytes_after < result.bytes_before


def test_a_change_of_low_rank_is_kept_whole(directory: Path, tmp_path: Path) -> None:
    base = BaseModel.from_pretrained(directory)
    write_own("full", base, tmp_path / "full")
    file = tmp_path / "full" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    linears = {f"{site.name}.weight" for site in base.linears}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(t.shape[0], 3, generator=generator) @ torch.randn(3, t.shape[1], generator=generator)
        if name in linears
        else t
        for name, t in load_file(file).items()
    }
    save_file(tensors, file)
    assert compress(str(directory), tmp_path / "full", tmp_path / "small", form="svd", rank=3).error < 1e-4


@pytest.mark.parametrize("form", ["bitdelta", "svd"])
def test_what_is_small_merges_as_it_is_served(form: str, directory: Path, adapter: Path, tmp_path: Path) -> None:
    compress(str(directory), adapter, tmp_path / "small", form=form, rank=8)
    merge(str(directory), tmp_path / "small", tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(directory, tmp_path / "small"), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_compressed_is_refused(directory: Path, adapter: Path, tmp_path: Path) -> None:
    lora = write_own("lora", BaseModel.from_pretrained(directory), tmp_path / "lora")
    with pytest.raises(InvalidAdapterError, match="holds none"):
        compress(str(directory), lora, tmp_path / "small")
    with pytest.raises(InvalidArgumentError, match="bitdelta, svd"):
        compress(str(directory), adapter, tmp_path / "small", form="zip")
    with pytest.raises(FailedPreconditionError, match="holds an adapter already"):
        compress(str(directory), adapter, adapter)
