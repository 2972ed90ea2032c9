"""A dominant program is merged into a second copy of the weights: alone on a few modules, and in a whole engine."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.model_executor.layers.utils import cpu_unquantized_gemm, dispatch_cpu_unquantized_gemm

from deltamux.conformance.parity import Greedy, served
from deltamux.deltas import BaseModel, Dense, LinearSite, LowRank, Program, Scale
from deltamux.deltas.backends.module_batch import ColumnRange, PackedSlice
from deltamux.deltas.ops import RowRange, StepIndex
from deltamux.engine.base import ProgramRef
from deltamux.engine.vllm.auto_merge.auto_merger import AutoMerger
from deltamux.engine.vllm.auto_merge.memory import available_memory
from deltamux.engine.vllm.auto_merge.merged_weights import changes_of, merge_change, mergeable_modules
from deltamux.engine.vllm.auto_merge.switched_linear import SwitchedLinear
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.engine.vllm.layers.current_step import IDLE, CurrentStep, MergedStep
from deltamux.engine.vllm.layers.linear import LinearWithDeltas
from deltamux.engine.vllm.layers.module_ops import ModuleOps, group_ops
from deltamux.engine.vllm.loading.loader import ProgramLoader
from deltamux.errors import FailedPreconditionError
from deltamux_testing import random_programs
from deltamux_testing.engines import assert_all_same

SLOTS, ROWS = 2, 8
FULL, LORA = 0, 1
"""The slots of two programs; rows of neither are the base's."""
SINGLE, FUSED = ("down_proj",), ("gate_proj", "up_proj")
PLENTY = 1 << 40
LAYER = "model.layers.0.mlp."


class Projection(nn.Module):
    """A projection that runs as vLLM's do on a CPU."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias, self.output_size = None, weight.shape[0]
        dispatch_cpu_unquantized_gemm(self, remove_weight=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = cpu_unquantized_gemm(self, x, self.weight, None)
        return y


class Modules(NamedTuple):
    """Some projections of the base's first layer with their layers."""

    current: CurrentStep
    layers: list[LinearWithDeltas]

    @classmethod
    def of(cls, base: BaseModel, directory: Path) -> Modules:
        linears = {site.name: site for site in base.linears}
        weights, current, layers = load_file(directory / "model.safetensors"), CurrentStep(), []
        for names in (SINGLE, FUSED):
            sites = [linears[LAYER + name] for name in names]
            starts = [sum(s.out_features for s in sites[:i]) for i in range(len(sites))]
            slices = [
                PackedSlice(s, ColumnRange(start, s.out_features)) for s, start in zip(sites, starts, strict=True)
            ]
            module = Projection(torch.cat([weights[f"{site.name}.weight"] for site in sites]))
            layers.append(
                LinearWithDeltas(module, current, ModuleOps(slices, SLOTS, torch.float32, torch.device("cpu")))
            )
        return cls(current, layers)

    def set(self, slot: int, program: Program) -> None:
        for layer in self.layers:
            numbers = {index.site.name: program_id for program_id, index in enumerate(layer.ops.slices)}
            layer.ops.set(slot, group_ops((numbers[site], op) for site, op in program if site in numbers))

    def run(self, runs: Sequence[RowRange], merged: int | None = None) -> list[Tensor]:
        """Returns every module's output for ROWS fixed rows, of which `runs` belong to programs."""
        index = StepIndex(runs, ROWS, SLOTS)
        return self.outputs(index, None if merged is None else MergedStep.of(index, merged))

    def outputs(self, index: StepIndex, merged: MergedStep | None) -> list[Tensor]:
        self.current.begin(index, merged)
        generator = torch.Generator().manual_seed(3)
        found = [layer.module(torch.randn(ROWS, _inputs(layer), generator=generator)) for layer in self.layers]
        self.current.begin(IDLE)
        return found


def _inputs(layer: LinearWithDeltas) -> int:
    site = layer.ops.slices[0].site
    assert isinstance(site, LinearSite)
    return site.in_features


def full(base: BaseModel, seed: int, scale: float = 0.08) -> Program:
    """A full fine-tuning: every projection's weight changes by as much as it is wide."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((s.name, (s.out_features, s.in_features)) for s in base.linears)
    return Program.of((name, Dense(scale * torch.randn(shape, generator=generator))) for name, shape in shapes)


class Rig:
    """A `AutoMerger` over a few modules, and the traffic that drives it."""

    def __init__(self, modules: Modules, checkpoint: Path, available: int, directory: Path) -> None:
        self.modules = modules
        self.loader = ProgramLoader(Program.load)
        self.slots = {7: FULL}
        self._directory = directory
        self.merger = AutoMerger(
            mergeable_modules(modules.layers),
            str(checkpoint),
            torch.float32,
            SLOTS,
            self.loader,
            self.slots,
            lambda: available,
        )

    def load(self, program_id: int, slot: int, program: Program) -> None:
        path = self._directory / f"{program_id}.safetensors"
        program.save(path)
        self.loader.load(program_id, path).result()
        self.modules.set(slot, program)

    def step(self, runs: Sequence[RowRange]) -> tuple[StepIndex, MergedStep | None]:
        index = StepIndex(runs, ROWS, SLOTS)
        numbers = {slot: program_id for program_id, slot in self.slots.items()}
        rows = {numbers[run.slot]: run.stop - run.start for run in runs}
        return index, self.merger.begin_step({**rows, 0: ROWS - sum(rows.values())}, index)

    def steps(self, runs: Sequence[RowRange], program_id: int = 600) -> None:
        for _ in range(program_id):
            self.step(runs)
            time.sleep(1e-4)  # lets the merging thread run


@pytest.fixture
def rig(base: BaseModel, base_directory: Path, tmp_path: Path) -> Rig:
    rig = Rig(Modules.of(base, base_directory), base_directory, PLENTY, tmp_path)
    rig.load(7, FULL, full(base, 1))
    return rig


ALL = [RowRange(FULL, 0, ROWS)]
MIXED = [RowRange(FULL, 0, 2), RowRange(LORA, 3, 4), RowRange(FULL, 4, 6)]
OTHERS = [2, 3, 6, 7]


def test_a_program_with_all_the_traffic_is_merged_to_the_same_outputs(rig: Rig) -> None:
    expected = rig.modules.run(ALL)
    rig.steps(ALL)
    assert rig.merger.merged == 7
    index, merged = rig.step(ALL)
    assert merged is not None
    assert not merged.weights.row_ranges, "its ops must not be applied once more"
    torch.testing.assert_close(rig.modules.outputs(index, merged), expected, rtol=1e-4, atol=1e-4)


def test_a_step_with_the_same_index_is_not_worked_out_again_and_one_with_another_is(rig: Rig) -> None:
    rig.steps(ALL)
    index, merged = rig.step(ALL)
    assert rig.merger.begin_step({7: ROWS}, index) is merged
    half, other = rig.step([RowRange(FULL, 0, ROWS - 1)])
    assert other is None or other.others is not None
    assert half is not index
    rig.slots[7] = LORA  # its place has changed: the rows of the old one are somebody else's
    assert rig.merger.begin_step({7: ROWS}, index) is None


def test_a_program_that_is_unloaded_is_unmerged_and_the_bases_weights_are_as_they_were(rig: Rig) -> None:
    expected = rig.modules.run([])
    rig.steps(ALL)
    rig.step(ALL)
    assert rig.merger.merged == 7
    rig.loader.drop(7)
    assert rig.step(ALL)[1] is None
    assert rig.merger.merged is None
    for before, after in zip(expected, rig.modules.run([]), strict=True):
        assert torch.equal(before, after)


def test_a_program_that_is_unloaded_during_its_merge_is_never_used(rig: Rig) -> None:
    while not rig.merger._changes:  # a index of it is there already
        rig.step(ALL)
    rig.loader.drop(7)
    rig.steps(ALL, 100)
    assert rig.merger.merged is None
    assert all(layer.base is None for layer in rig.modules.layers)


def test_others_rows_never_use_the_merged_weights_even_if_those_are_not_finite(
    base: BaseModel, base_directory: Path
) -> None:
    modules = Modules.of(base, base_directory)
    modules.set(FULL, full(base, 1))
    modules.set(LORA, random_programs.low_rank(base, 2))
    expected = modules.run(MIXED)
    for module in mergeable_modules(modules.layers):
        module.linear.set_second(torch.full((module.linear.out_features, module.linear.in_features), float("nan")))
        module.layer.base = module.linear.base
        module.linear.select_second()
    for before, after in zip(expected, modules.run(MIXED, merged=FULL), strict=True):
        torch.testing.assert_close(after[OTHERS], before[OTHERS], rtol=1e-5, atol=1e-5)
        assert after[[0, 1, 4, 5]].isnan().all(), "the merged weights are those that ran"


def test_nothing_is_merged_while_memory_is_short_and_that_is_logged(
    base: BaseModel, base_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(Modules.of(base, base_directory), base_directory, 1 << 20, tmp_path)
    rig.load(7, FULL, full(base, 1))
    rig.steps(ALL, 1200)
    assert rig.merger.merged is None
    assert [r.getMessage() for r in caplog.records if "no room" in r.getMessage()]


def test_nothing_is_merged_over_a_checkpoint_that_is_not_what_the_engine_has_loaded(
    base: BaseModel, base_directory: Path, tmp_path: Path
) -> None:
    other = {name: weight + 0.02 for name, weight in load_file(base_directory / "model.safetensors").items()}
    save_file(other, tmp_path / "model.safetensors")
    rig = Rig(Modules.of(base, base_directory), tmp_path, PLENTY, tmp_path)
    rig.load(7, FULL, full(base, 1))
    rig.steps(ALL)
    assert rig.merger.merged is None
    assert all(layer.base is None for layer in rig.modules.layers)


def test_a_change_that_rounding_would_lose_is_not_merged(base: BaseModel, base_directory: Path) -> None:
    weights = load_file(base_directory / "model.safetensors")
    modules = mergeable_modules(Modules.of(base, base_directory).layers)
    visible, faint = (changes_of(modules, full(base, 1, scale))[0] for scale in (1e-1, 1e-4))
    assert merge_change(visible, weights.__getitem__, torch.bfloat16).weight.dtype is torch.bfloat16
    with pytest.raises(FailedPreconditionError, match="too coarse"):
        merge_change(faint, weights.__getitem__, torch.bfloat16)


def test_ops_whose_order_a_merge_would_change_are_not_merged(base: BaseModel, base_directory: Path) -> None:
    modules = mergeable_modules(Modules.of(base, base_directory).layers)
    site = LAYER + "down_proj"
    change, scale = LowRank(torch.ones(1, 128), torch.ones(64, 1)), Scale(torch.ones(64))
    assert len(changes_of(modules, Program.of([(site, change), (site, scale)]))) == 1
    assert not changes_of(modules, Program.of([(site, scale), (site, change)]))


def test_a_module_without_a_handler_of_the_known_kind_is_left_out() -> None:
    assert SwitchedLinear.of(nn.Linear(4, 4), 4) is None


def test_a_module_of_which_a_part_takes_no_deltas_keeps_its_weights(base: BaseModel, base_directory: Path) -> None:
    current, (_, fused) = Modules.of(base, base_directory)
    part = ModuleOps(fused.ops.slices[:1], SLOTS, torch.float32, torch.device("cpu"))
    layer = LinearWithDeltas(fused.module, current, part)
    handler = inspect.getclosurevars(fused.module.cpu_linear).nonlocals["handler"]  # type: ignore[arg-type]  # vLLM's
    assert not mergeable_modules([layer])
    assert type(handler) is CPUDNNLGEMMHandler, "its packed weight would be freed with what was made of it"
    assert layer.is_packed


def test_memory_is_what_the_container_leaves_of_what_the_machine_has(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > 0
    for name, value in {"max": "5000", "current": "3000", "stat": "anon 2500\ninactive_file 400"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{value}\n")
    assert available_memory(tmp_path) == 2400


# In the whole engine, compiled.

TOKENS, STREAMS = 100, 8
request_numbers = count()


async def crowd(engine: VLLMEngine, refs: Sequence[ProgramRef | None]) -> list[Greedy]:
    """Serves one stream for each program at once; the i-th always has the same prompt."""
    jobs = (served(engine, (5, 6, 7 + i), ref, TOKENS, f"merge-{next(request_numbers)}") for i, ref in enumerate(refs))
    return await asyncio.gather(*jobs)


async def merged(engine: VLLMEngine) -> list[int]:
    resident = (await engine.call_workers("delta_resident"))[0]
    assert isinstance(resident, dict)
    programs: list[int] = resident["merged"]
    return programs


async def traffic_until(
    engine: VLLMEngine, refs: Sequence[ProgramRef | None], expected: Sequence[Greedy], done: Callable[[list[int]], bool]
) -> None:
    """Sends the same requests again and again, holding every answer against what is expected."""
    for _ in range(20):
        if done(await merged(engine)):
            return
        assert_all_same(expected, await crowd(engine, refs))
    pytest.fail(f"after 20 rounds, merged is {await merged(engine)}")


@pytest.fixture
def refs(base: BaseModel, tmp_path: Path) -> dict[str, ProgramRef]:
    programs = {"merge-full": full(base, 21), "merge-lora": random_programs.low_rank(base, 22)}
    return {name: random_programs.saved(program, tmp_path, name) for name, program in programs.items()}


async def test_the_engine_merges_under_traffic_answers_all_alike_and_unmerges(
    engine: VLLMEngine, refs: dict[str, ProgramRef]
) -> None:
    dominant, lora = refs["merge-full"], refs["merge-lora"]
    alone, mixed, bases = [dominant] * STREAMS, [dominant] * 6 + [lora, None], [None] * STREAMS
    expected_alone, expected_mixed, expected_bases = [await crowd(engine, each) for each in (alone, mixed, bases)]

    await traffic_until(engine, alone, expected_alone, bool)
    assert (await engine.stats()).merged_program == dominant.digest
    assert_all_same(expected_alone, await crowd(engine, alone))
    assert_all_same(expected_mixed, await crowd(engine, mixed))

    await traffic_until(engine, bases, expected_bases, lambda programs: not programs)
    assert (await engine.stats()).merged_program is None
    assert_all_same(expected_mixed, await crowd(engine, mixed))

    await traffic_until(engine, alone, expected_alone, bool)
    await engine.evict(dominant.digest)
    assert not await merged(engine), "a program that is gone is merged no longer"
    assert_all_same(expected_bases, await crowd(engine, bases))
    assert_all_same(expected_alone, await crowd(engine, alone))
