"""Random ops of a packed module for the Triton kernels, and what they compute alone on a CPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltamux.deltas import (
    Bias,
    BlockRole,
    LinearSite,
    LowRank,
    Op,
    Scale,
)
from deltamux.deltas.ops.step import RowRange
from deltamux.deltas.sites import EmbeddingSite
from deltamux_testing.random_ops import FEATURES, draw, index_of

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
EMBEDDING = EmbeddingSite("embed", 16, FEATURES)
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.1, 2e-2)}
"""Absolute and relative; for bfloat16, against float32: what rounding inner products and the result makes of it."""


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    atol, rtol = TOLERANCE[dtype]
    # What is rounded are the terms of a sum, so where large ones cancel, the error is theirs, not the result's.
    largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if expected.numel() else 0.0
    atol *= max(1.0, largest / 10)
    torch.testing.assert_close(actual.float().cpu(), expected, atol=atol, rtol=rtol)


SIZES = (96, 40, 72)
"""Columns of the slices of a packed module: no multiples of what a program finishes at once."""


def owners(step: list[tuple[int, int]]) -> tuple[list[RowRange], int]:
    index = index_of(step)
    return [RowRange(*run) for run in index.row_ranges], index.num_rows


def parts(in_features: int) -> list[LinearSite]:
    return [LinearSite(f"part{i}", in_features, n, True, False, 0, BlockRole.ATTENTION) for i, n in enumerate(SIZES)]


def sequence(seed: int, site: LinearSite) -> list[Op]:
    """Zero to three of a program's ops at one part, in any order, of any rank."""
    generator = np.random.default_rng(seed)
    out, width = site.out_features, site.in_features**-0.5

    def one(kind: int, i: int) -> Op:
        rank = int(generator.integers(1, 9))
        if kind == 0:
            return LowRank(draw(seed + i, rank, site.in_features) * width, draw(seed + i + 1, out, rank), scale=0.5)
        return Scale(draw(seed + i, out)) if kind == 1 else Bias(draw(seed + i, out))

    return [one(int(generator.integers(3)), 10 * i) for i in range(int(generator.integers(4)))]


def moved(op: Op, dtype: torch.dtype) -> Op:
    return op.to(dtype, DEVICE)


def alone(ops: list[Op], x: Tensor, y: Tensor, site: Any) -> Tensor:
    """One adapter's ops in float32, on a CPU, of the values that the kernels were given."""
    x, y = x.float().cpu(), y.float().cpu()
    for op in ops:
        y = op.to(torch.float32, "cpu").apply(x, y, site)
    return y
