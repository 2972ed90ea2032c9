"""A plugin of pytest: every op's batch is the one that launches kernels, where it has one (see `test_triton.py`)."""

from __future__ import annotations

from deltamux.deltas.kernels.triton import batch_class
from deltamux.deltas.ops import OPS

for op in OPS.values():
    op.batch = batch_class(op.batch, "cpu")
