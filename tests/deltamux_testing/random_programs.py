"""Small base models and random programs for the engine's tests.

Weights are drawn wide, so that log-probabilities are spread and every adapter visibly changes what is generated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import (
    BaseModel,
    Bias,
    BlockRole,
    Bottleneck,
    KVPrefix,
    LinearSite,
    LowRank,
    NormAffine,
    Op,
    Program,
    Scale,
    ScaleInput,
    SoftPrompt,
)
from deltamux.engine.base import ProgramRef


def low_rank(base: BaseModel, seed: int, rank: int = 4) -> Program:
    draw = _Draw(seed)
    return Program.of((s.name, LowRank(draw(rank, s.in_features), draw(s.out_features, rank))) for s in base.linears)


def bias(base: BaseModel, seed: int) -> Program:
    draw = _Draw(seed)
    return Program.of((s.name, Bias(draw(s.out_features))) for s in base.linears)


def bottleneck(base: BaseModel, seed: int, **attributes: Any) -> Program:
    draw = _Draw(seed)

    def module(features: int) -> Bottleneck:
        return Bottleneck(draw(8, features), draw(features, 8), draw(8), draw(features), **attributes)

    norms: list[tuple[str, Op]] = [(s.name, NormAffine(draw(s.features), draw(s.features))) for s in base.norms]
    return Program.of([(s.name, module(s.features)) for s in base.blocks] + norms)


def prefix(base: BaseModel, seed: int, length: int = 5) -> Program:
    draw = _Draw(seed, scale=1.0)
    shapes = ((s.name, (length, s.num_kv_heads, s.head_dim)) for s in base.attentions)
    return Program.of((name, KVPrefix(draw(*shape), draw(*shape))) for name, shape in shapes)


def scale(base: BaseModel, seed: int) -> Program:
    draw = _Draw(seed)
    inputs = [block.output_module for block in base.blocks if block.role is BlockRole.FEED_FORWARD]
    sizes = {site.name: site for site in base.linears}
    scaled: list[tuple[str, Op]] = [(s.name, Scale(1 + draw(s.out_features))) for s in base.linears]
    return Program.of([*((n, ScaleInput(1 + draw(sizes[n].in_features))) for n in inputs), *scaled])


def soft_prompt(base: BaseModel, seed: int, length: int = 5) -> Program:
    return Program.of([(base.embedding.name, SoftPrompt(_Draw(seed, scale=1.0)(length, base.dims.hidden_size)))])


def everything(base: BaseModel, seed: int) -> Program:
    """One adapter with every op at once, two of them repeated at their sites."""
    programs = [
        low_rank(base, seed),
        prefix(base, seed + 1, length=3),
        bottleneck(base, seed + 2, parallel=True, activation="gelu"),
        bias(base, seed + 3),
        scale(base, seed + 6),
        low_rank(base, seed + 4, rank=2),
        bottleneck(base, seed + 5),
        bottleneck(base, seed + 7, residual=True),
    ]
    return Program.of(placement for program in programs for placement in program)


def saved(program: Program, directory: Path, name: str) -> ProgramRef:
    """Writes the compiled file; `name` stands for its digest."""
    path = directory / f"{name}.safetensors"
    program.save(path)
    return ProgramRef(name, path, program.num_virtual_tokens)


def with_nan(program: Program) -> Program:
    """The same program with one value that is not finite."""
    site, op = program.placements[0]
    tensors = op.tensors()
    first = next(iter(tensors))
    tensors[first] = tensors[first].clone()
    tensors[first].view(-1)[0] = float("nan")
    return Program.of([(site, op.of(tensors, op.attributes())), *program.placements[1:]])


def for_another_base(base: BaseModel) -> Program:
    """A program whose shapes fit a base twice as wide."""
    site: Any = next(s for s in base.sites.values() if isinstance(s, LinearSite))
    return Program.of([(site.name, LowRank(torch.zeros(4, 2 * site.in_features), torch.zeros(site.out_features, 4)))])


class _Draw:
    """Draws normal tensors of the given shape from one seed."""

    def __init__(self, seed: int, scale: float = 0.15) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._scale = scale

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator) * self._scale
