"""Batched ops on a GPU: Triton kernels over static buffers.

Importing this package is cheap: Triton is imported when the first batch is made for a device that has kernels.
``TRITON_INTERPRET=1`` runs the same kernels on a CPU, in Triton's interpreter: slow, and what the tests use.

* `step_records`: the rows of a step, as records of a fixed shape that one asynchronous copy refreshes.
* `matrix`, `rows`: the kernels. All of them select and never mask by multiplication: a program works on rows of one
  slot alone, loads nothing of another slot, and stores nothing outside its rows, so that a slot full of NaN reaches its
  own rows only. Sums are taken in a fixed order (no atomics).
* `launches`: how those of `matrix` are launched.
* `linear`, `bottleneck`, `norm`, `factors`, `virtual`: the parameters of all slots at one module, and their launches.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch


def available(device: torch.device | str) -> bool:
    """Returns whether the kernels run on a device: one of CUDA's, or a CPU with Triton's interpreter."""
    kind = torch.device(device).type
    return _has_triton() and (kind == "cuda" or (kind == "cpu" and interpreted()))


def interpreted() -> bool:
    """Returns whether the environment turns Triton's interpreter on."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
