"""What the benchmark runs on: a random base, and adapters as vLLM and as deltamux read them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Self

import torch

from benchmarks.inputs import Size, write_base
from deltamux.deltas import BaseModel, Bottleneck, Checkpoint, NormAffine, Op, Program, Scale
from deltamux.engine.base import ProgramRef
from deltamux_testing.random_programs import low_rank, prefix, saved

LORAS = 16
WIDTH = 32
PREFIX = 16


def _sized(hidden: int, layers: int) -> Size:
    return Size(hidden, layers, head=128, group=4, inner=3.5, vocabulary=32_000)


SIZES = {"tiny": _sized(512, 2), "small": _sized(1024, 12), "1b": _sized(2048, 18), "8b": _sized(4096, 32)}


class GPUInputs(NamedTuple):
    """Files of the base and of its adapters.

    Attributes:
        peft: LoRAs as PEFT's directories; programs: the same LoRAs, and one adapter of each other mechanism.
        rank: of every LoRA.
    """

    base: Path
    rank: int
    peft: list[Path]
    programs: dict[str, ProgramRef]

    @classmethod
    def write(cls, folder: Path, size: Size, rank: int) -> Self:
        directory = write_base(folder / "base", size)
        base = BaseModel.from_pretrained(directory)
        loras = {f"lora-{i}": low_rank(base, i, rank) for i in range(LORAS)}
        peft = [_write_peft(folder / f"peft-{i}", lora, rank) for i, lora in enumerate(loras.values())]
        made = loras | _others(base)
        return cls(directory, rank, peft, {name: saved(program, folder, name) for name, program in made.items()})


def _write_peft(directory: Path, lora: Program, rank: int) -> Path:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in lora}),
        "bias": "none",
    }
    tensors = {
        f"base_model.model.{name}.lora_{factor.upper()}.weight": op.tensors()[factor]
        for name, op in lora
        for factor in "ab"
    }
    Checkpoint(config, tensors).write(directory)
    return directory


def _others(base: BaseModel) -> dict[str, Program]:
    hidden, small = base.dims.hidden_size, 0.02
    houlsby: list[tuple[str, Op]] = [
        (b.name, Bottleneck(torch.randn(WIDTH, hidden) * small, torch.randn(hidden, WIDTH) * small))
        for b in base.blocks
    ]
    houlsby += ((n.name, NormAffine(torch.randn(hidden) * small)) for n in base.norms)
    values = (s for s in base.linears if s.name.endswith(("k_proj", "v_proj")))
    scale = ((s.name, Scale(1 + torch.randn(s.out_features) * small)) for s in values)
    return {"houlsby": Program.of(houlsby), "prefix": prefix(base, 0, PREFIX), "scale": Program.of(scale)}
