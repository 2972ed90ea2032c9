"""Folds a program into plain weights: a pure function of tensors; the base is never changed in place."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamux.deltas.base_model import BaseModel
from deltamux.deltas.program import Program
from deltamux.errors import InvalidAdapterError


def merge_program(program: Program, base: BaseModel) -> dict[str, Tensor]:
    """Returns the base parameters that the program changes, merged, by name and in the base's dtype.

    The arithmetic runs in float32 and the result is rounded once.

    Raises:
        NotMergeableError: an op cannot be folded into weights; the message says which and why.
        InvalidAdapterError: a merged weight is not finite.
    """
    merged: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        return merged[name] if name in merged else _tensor(base, name)

    for site, op in program.placed(base):
        merged.update(op.merge(site, read))
    return {name: _rounded(name, tensor, _tensor(base, name).dtype) for name, tensor in merged.items()}


def _tensor(base: BaseModel, name: str) -> Tensor:
    if not base.has_tensor(name):
        raise KeyError(name)
    return base.tensor(name)


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    if not torch.isfinite(rounded).all():
        raise InvalidAdapterError(
            f"merging makes {name} overflow in {dtype}: the adapter's change is too large for the base's dtype",
            reason="NOT_FINITE",
            metadata={"tensor": name},
        )
    return rounded
