"""Modules of a loaded model are held by what they compute, whatever their names say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deltamux.deltas import BlockRole, EmbeddingSite, LinearSite, NormSite
from deltamux.deltas.backends.module_batch import ColumnRange
from deltamux.deltas.sites import NormForm
from deltamux.deltas.weights import WeightFiles
from deltamux.engine.vllm.layers.probes import ProbeError, Probes

SITE = LinearSite("q", 32, 96, has_bias=False, transposed=False, layer=0, block=BlockRole.ATTENTION)
WHOLE = ColumnRange(0, 96)


def probes(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, *, quantised: bool = False
) -> Probes:
    save_file(dict(tensors), folder / "model.safetensors")
    return Probes(WeightFiles.locate(folder), dtype, torch.device("cpu"), quantised=quantised)


def linear(weight: Tensor, *, bias: bool = False) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    module.weight.data.copy_(weight)
    return module


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(96, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_of_the_checkpoints_weight_is_taken_in_any_dtype(
    tmp_path: Path, weight: Tensor, dtype: torch.dtype, bias: bool
) -> None:
    probes(tmp_path, {"q.weight": weight}, dtype).check_linear(SITE, linear(weight.to(dtype), bias=bias), WHOLE)


def test_the_order_of_a_projection_whose_rows_were_reordered_is_found(tmp_path: Path, weight: Tensor) -> None:
    order = torch.arange(96).view(2, 48).T.flatten()
    found = probes(tmp_path, {"q.weight": weight}).check_linear(SITE, linear(weight[order]), WHOLE)
    assert found is not None
    assert found.tolist() == order.tolist()


@pytest.mark.parametrize("change", [lambda w: 2 * w, lambda w: -w, torch.zeros_like])
def test_a_projection_of_another_weight_is_refused(tmp_path: Path, weight: Tensor, change: object) -> None:
    assert callable(change)
    with pytest.raises(ProbeError, match="something else than the checkpoint's weight"):
        probes(tmp_path, {"q.weight": weight}).check_linear(SITE, linear(change(weight)), WHOLE)


def test_a_projection_without_a_tensor_to_compare_with_is_refused(tmp_path: Path, weight: Tensor) -> None:
    with pytest.raises(ProbeError, match=r"no q\.weight"):
        probes(tmp_path, {"other.weight": weight}).check_linear(SITE, linear(weight), WHOLE)


@pytest.mark.parametrize("stored", ["q.weight", "q.qweight"])
def test_a_projection_that_a_quantised_checkpoint_packs_is_taken_by_name(
    tmp_path: Path, weight: Tensor, stored: str
) -> None:
    packed = probes(tmp_path, {stored: weight.to(torch.int8)}, quantised=True)
    packed.check_linear(SITE, linear(weight), WHOLE)
    assert packed.find_linear(SITE, {"q": linear(weight)}) is None


def test_a_projection_that_the_engine_quantises_is_compared_all_the_same(tmp_path: Path, weight: Tensor) -> None:
    rounded = (weight * 4).round() / 4
    compared = probes(tmp_path, {"q.weight": weight}, quantised=True)
    compared.check_linear(SITE, linear(rounded), WHOLE)
    with pytest.raises(ProbeError):
        compared.check_linear(SITE, linear(-rounded), WHOLE)


def test_a_projection_is_found_in_a_packed_one_that_no_name_leads_to(tmp_path: Path, weight: Tensor) -> None:
    other = torch.randn(64, 32, generator=torch.Generator().manual_seed(4))
    modules = {"mlp": linear(other), "qkv": linear(torch.cat([other, weight]))}
    searched = probes(tmp_path, {"q.weight": weight})
    assert searched.find_linear(SITE, modules) == ("qkv", ColumnRange(64, 96))
    assert searched.find_linear(SITE, {"mlp": modules["mlp"]}) is None


class Narrow(nn.Linear):
    """A projection from 16 features whose kernel, as vLLM's, does not check the width of what it reads."""

    def __init__(self) -> None:
        super().__init__(16, 96, bias=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x[:, :16])


def test_a_projection_of_another_width_is_refused_without_being_run(tmp_path: Path, weight: Tensor) -> None:
    module, compared = Narrow(), probes(tmp_path, {"q.weight": weight})
    assert compared.find_linear(SITE, {"q": module}) is None
    with pytest.raises(ProbeError, match="takes 16 features, and the base's 32"):
        compared.check_linear(SITE, module, WHOLE)
    assert module.calls == 0


class Norm(nn.Module):
    """A norm of the given form, whose weight may be stored less one."""

    def __init__(self, weight: Tensor, form: NormForm, *, less_one: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps, self.offset, self.form = weight, eps, float(less_one), form

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        centred = total - total.mean(-1, keepdim=True) if self.form is NormForm.LAYER else total
        y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)
        return y if residual is None else (y, total)


class KeepsResidual(Norm):
    """One that hands the residual through."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        y = super().forward(x)
        assert isinstance(y, Tensor)
        return y if residual is None else (y, residual)


def norm_site(form: NormForm = NormForm.RMS) -> NormSite:
    return NormSite("norm", 32, form, 1e-6, has_bias=False, layer=0)


@pytest.mark.parametrize("form", list(NormForm))
@pytest.mark.parametrize("less_one", [False, True])
def test_a_norm_is_taken_with_its_weight_or_one_that_is_stored_less_one(
    tmp_path: Path, form: NormForm, less_one: bool
) -> None:
    weight = torch.rand(32, generator=torch.Generator().manual_seed(5))
    found = probes(tmp_path, {"norm.weight": weight}).check_norm(norm_site(form), Norm(weight, form, less_one=less_one))
    assert found, "it adds the residual that it is given"


def test_a_norm_that_hands_its_residual_through_does_not_add_it(tmp_path: Path) -> None:
    weight = torch.rand(32)
    kept = KeepsResidual(weight, NormForm.RMS)
    assert not probes(tmp_path, {"norm.weight": weight}).check_norm(norm_site(), kept)


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (Norm(torch.ones(32), NormForm.LAYER), "does not normalise as the base does"),
        (Norm(torch.ones(32), NormForm.RMS, eps=1e-3), "does not normalise as the base does"),
        (Norm(torch.linspace(1, 2, 32), NormForm.RMS), "another weight"),
        (nn.Linear(8, 8), "does not run as a norm"),
    ],
    ids=["centres", "epsilon", "weight", "no norm"],
)
def test_a_norm_that_computes_something_else_is_refused(tmp_path: Path, module: nn.Module, problem: str) -> None:
    with pytest.raises(ProbeError, match=problem):
        probes(tmp_path, {"norm.weight": torch.ones(32)}).check_norm(norm_site(), module)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_scale_of_an_embedding_is_that_of_the_base_over_vllms(tmp_path: Path, scale: float) -> None:
    table = torch.randn(50, 32)
    site, embedding = EmbeddingSite("embed", 50, 32, scale), nn.Embedding(50, 32)
    embedding.weight.data.copy_(table)
    found = probes(tmp_path, {"embed.weight": table}).embedding_scale(site, embedding)
    assert found == pytest.approx(scale)


def test_a_router_that_returns_another_dtype_than_the_engines_is_refused(tmp_path: Path, weight: Tensor) -> None:
    found = probes(tmp_path, {"q.weight": weight}, torch.bfloat16)
    found.check_dtype(SITE, linear(weight.bfloat16()))

    class InFloat32(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() @ weight.T

    with pytest.raises(ProbeError, match=r"computes q in torch.float32, and deltas are in torch.bfloat16"):
        found.check_dtype(SITE, InFloat32())
