"""The fast path: it does what the layers do in Python, and calls the fallbacks where an op has no kernel."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltamux.deltas import (
    Bias,
    BlockRole,
    BlockSite,
    Bottleneck,
    GatedLowRank,
    LinearSite,
    LowRank,
    NormAffine,
    NormSite,
    Op,
    Scale,
    ScaleInput,
    Site,
)
from deltamux.deltas.backends.cpu import library
from deltamux.deltas.backends.module_batch import ColumnRange, PackedSlice
from deltamux.deltas.ops import StepIndex
from deltamux.deltas.sites import NormForm
from deltamux.engine.vllm.layers import custom_ops
from deltamux.engine.vllm.layers.current_step import CurrentStep, MergedStep
from deltamux.engine.vllm.layers.linear import BlockInput, LinearWithDeltas, SubLayer
from deltamux.engine.vllm.layers.module_ops import ModuleOps, group_ops
from deltamux.engine.vllm.layers.norm import NormWithDeltas
from deltamux_testing.steps import step_of

WIDTH = 24
QUERY, KEY = 20, 12
SLOTS = 70
"""More than the bits of a word."""

PLACED = (0, 3, 63, 64, 69)
CPU = torch.device("cpu")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def linear(name: str, columns: int, width: int = WIDTH) -> LinearSite:
    return LinearSite(name, width, columns, True, False, 0, BlockRole.ATTENTION)


def low_rank(seed: int, columns: int, width: int = WIDTH) -> Op:
    return LowRank(draw(seed, 1 + seed % 5, width), draw(seed + 1, columns, 1 + seed % 5))


def bottleneck(seed: int, **attributes: bool) -> Op:
    return Bottleneck(draw(seed, 3, WIDTH), draw(seed, WIDTH, 3), None, None, activation="relu", **attributes)


class Place(NamedTuple):
    module: str
    slice_index: int


OPS: dict[str, tuple[Place, Op]] = {
    "low_rank at the query": (Place("read", 0), low_rank(1, QUERY)),
    "low_rank at the key": (Place("read", 1), low_rank(2, KEY)),
    "bias": (Place("read", 1), Bias(draw(3, KEY))),
    "scale": (Place("read", 0), Scale(draw(4, QUERY))),
    "without a kernel": (
        Place("read", 0),
        GatedLowRank(draw(5, 2, WIDTH), draw(6, QUERY, 2), gate_weight=draw(7, WIDTH), gate_bias=draw(8, 1)),
    ),
    "scaled input": (Place("end", 0), ScaleInput(draw(9, QUERY))),
    "low_rank at the end": (Place("end", 0), low_rank(10, WIDTH, QUERY)),
    "bottleneck": (Place("sub_layer", 0), bottleneck(11)),
    "bottleneck of the residual stream": (Place("sub_layer", 0), bottleneck(12, parallel=True, residual=True)),
    "norm": (Place("norm", 0), NormAffine(draw(13, WIDTH), draw(14, WIDTH))),
}


class Projection(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.output_size = weight, weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


class Attention:
    """A norm, a packed projection that reads its output, and one that ends the sub-layer."""

    def __init__(self, dtype: torch.dtype, *, fast: bool = True) -> None:
        self.step = CurrentStep()
        self.ops = {
            "norm": self._ops(dtype, [NormSite("norm", WIDTH, NormForm.RMS, 1e-5, False, 0)]),
            "read": self._ops(dtype, [linear("query", QUERY), linear("key", KEY)]),
            "end": self._ops(dtype, [linear("end", WIDTH, QUERY)]),
            "sub_layer": self._ops(dtype, [BlockSite("block", WIDTH, BlockRole.ATTENTION, "query", "end", 0, "norm")]),
        }
        for ops in self.ops.values():
            assert ops.fast_path is not None, "these tests need a C++ compiler and Python's headers, as the engine does"
            if not fast:
                ops.fast_path = None
        read = BlockInput()
        self.norm = NormWithDeltas(Norm(), self.step, self.ops["norm"], adds_residual=True)
        self.norm.feeds = read
        self.read = LinearWithDeltas(Projection(draw(20, QUERY + KEY, WIDTH).to(dtype)), self.step, self.ops["read"])
        self.read.reads.append(read)
        self.end = LinearWithDeltas(Projection(draw(21, WIDTH, QUERY).to(dtype)), self.step, self.ops["end"])
        self.end.end(SubLayer(self.ops["sub_layer"], read))

    def _ops(self, dtype: torch.dtype, sites: list[Site]) -> ModuleOps:
        sizes = [site.out_features if isinstance(site, LinearSite) else WIDTH for site in sites]
        slices = [PackedSlice(site, ColumnRange(sum(sizes[:i]), sizes[i])) for i, site in enumerate(sites)]
        return ModuleOps(slices, SLOTS, dtype, CPU)

    def set(self, slot: int, names: list[str], dtype: torch.dtype) -> None:
        for at, ops in self.ops.items():
            chosen = (OPS[name] for name in names)
            ops.set(slot, group_ops((place.slice_index, op.to(dtype)) for place, op in chosen if place.module == at))

    def reset(self, slot: int) -> None:
        for ops in self.ops.values():
            ops.reset(slot)

    def run(self, x: Tensor, index: StepIndex, merged: MergedStep | None = None) -> Tensor:
        self.step.begin(index, merged)
        with torch.inference_mode():
            hidden = self.read.module(self.norm.module(x))
            return torch.cat([hidden, self.end.module(hidden[:, :QUERY].contiguous())], 1)


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers' methods that were called, in order."""
    called: list[str] = []
    for name in ("change_input", "change_output", "change_sub_layer"):
        for kind in (LinearWithDeltas, NormWithDeltas):
            method = getattr(kind, name)

            def counted(self: object, *args: object, _name: str = name, _method: object = method) -> object:
                called.append(_name)
                return _method(self, *args)  # type: ignore[operator]  # a method of the layer

            monkeypatch.setattr(kind, name, counted)
    return called


index_of = partial(step_of, num_slots=SLOTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@settings(max_examples=60, deadline=None)
@given(
    programs=st.dictionaries(
        st.sampled_from(PLACED), st.lists(st.sampled_from(list(OPS)), unique=True, max_size=5), min_size=1
    ),
    cleared=st.sets(st.sampled_from(PLACED)),
    step=st.lists(st.tuples(st.sampled_from((-1, *PLACED)), st.integers(1, 6)), min_size=1, max_size=6),
)
def test_the_fast_path_computes_bit_for_bit_what_the_fallbacks_do(
    dtype: torch.dtype, programs: dict[int, list[str]], cleared: set[int], step: list[tuple[int, int]]
) -> None:
    quick, python = Attention(dtype), Attention(dtype, fast=False)
    for model in (quick, python):
        for slot, names in programs.items():
            model.set(slot, names, dtype)
        for slot in cleared:
            model.reset(slot)
    index = index_of(step)
    x = draw(30, index.num_rows, WIDTH).to(dtype)
    assert torch.equal(quick.run(x, index), python.run(x, index))


WITH_KERNELS = [name for name in OPS if name != "without a kernel"]


def test_no_fallback_runs_where_every_op_has_a_kernel(fallbacks: list[str]) -> None:
    model = Attention(torch.bfloat16)
    model.set(69, WITH_KERNELS, torch.bfloat16)
    x, index = draw(1, 4, WIDTH).bfloat16(), index_of([(-1, 1), (69, 3)])
    changed = model.run(x, index)
    assert fallbacks == []
    untouched = model.run(x, index_of([(-1, 4)]))
    assert torch.equal(changed[0], untouched[0])
    assert not torch.isclose(changed[1:], untouched[1:]).all(1).any()


def test_an_op_without_a_kernel_takes_its_module_to_the_fallback_in_its_own_steps_alone(fallbacks: list[str]) -> None:
    model = Attention(torch.float32)
    model.set(3, ["low_rank at the query", "without a kernel"], torch.float32)
    model.set(5, WITH_KERNELS, torch.float32)
    x = draw(1, 2, WIDTH)
    model.run(x, index_of([(5, 2)]))
    assert fallbacks == []
    model.run(x, index_of([(5, 1), (3, 1)]))
    assert fallbacks == ["change_output"]
    model.reset(3)
    model.run(x, index_of([(5, 1), (3, 1)]))
    assert fallbacks == ["change_output"]


def test_a_step_with_merged_weights_is_the_fallbacks(fallbacks: list[str]) -> None:
    model = Attention(torch.float32)
    model.set(3, ["low_rank at the query"], torch.float32)
    index = index_of([(3, 2)])
    model.run(draw(1, 2, WIDTH), index, MergedStep.of(index, 3))
    assert fallbacks == ["change_output"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.double(), "float32 or bfloat16"),
        (lambda x: x.bfloat16(), "not of the dtype"),
        (lambda x: x.T.contiguous().T, "contiguous rows"),
        (lambda x: x[0], "matrices"),
    ],
    ids=["other dtype", "other dtype than the deltas", "scattered rows", "vector"],
)
def test_what_no_kernel_can_read_is_refused_and_nothing_is_changed(change: object, words: str) -> None:
    model = Attention(torch.float32)
    model.set(3, ["bias", "low_rank at the key"], torch.float32)
    model.step.begin(index_of([(3, 4)]))
    x, y = draw(1, 4, WIDTH), draw(2, 4, QUERY + KEY)
    before = y.clone()
    with torch.inference_mode(), pytest.raises(ValueError, match=words):
        custom_ops.change_output(change(x), y, model.read._handle)  # type: ignore[operator]  # what the case does to x
    assert torch.equal(y, before)


def test_the_fast_path_takes_as_many_arguments_as_its_fallback() -> None:
    compiled = custom_ops._compiled()
    assert compiled is not None
    with pytest.raises(TypeError, match="3 arguments, not 1"):
        compiled.change_output(0)
    with pytest.raises(TypeError, match="int"):
        compiled.change_output(draw(1, 1, 1), draw(1, 1, 1), "first")


WITHOUT_HEADERS = """
import logging, sys
from pathlib import Path
logging.basicConfig()
from deltamux.engine.vllm.layers.fast_path import fast_path
from deltamux.deltas.backends.cpu import library
fast_path.PYTHON_HEADERS = Path("/nowhere")
print([fast_path.install(()) for _ in range(2)], library.load() is not None)
"""


@pytest.mark.slow
def test_without_pythons_headers_the_kernels_run_from_python_and_it_is_logged_once(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEADERS],
        env={"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "[None, None] True"
    assert ran.stderr.count("Python's headers are missing") == 1


def test_a_mask_holds_any_slots() -> None:
    mask = library.Mask()
    mask.set(1 << 3)
    for value in (0, 1, 1 << 63, 1 << 64, (1 << 130) | 5, 1):
        mask.set(value)
        words = (ctypes.c_uint64 * mask.count).from_address(mask.words)
        assert sum(word << 64 * i for i, word in enumerate(words)) == value
