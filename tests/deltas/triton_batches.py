"""A plugin of pytest: every op's batch is the one that launches kernels, where it has one (see `test_triton.py`).

Of `test_batched.py` it leaves out what says nothing of kernels: ops that have none, and the torch batches' own ways.
"""

from __future__ import annotations

from typing import Any

import pytest

from deltamux.deltas.batches import batch_class
from deltamux.deltas.ops import OPS

TORCH = {op.batch for op in OPS.values()}
for op in OPS.values():
    op.batch = batch_class(op.batch, "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _concerns_kernels(getattr(item, "callspec", None))]
    assert items


def _concerns_kernels(parameters: Any) -> bool:
    if parameters is None:
        return True
    _, op = parameters.params["maker"](0)
    return parameters.params.get("path", "own choice") == "own choice" and type(op).batch not in TORCH
