"""Merges a program into plain weights: a pure function of tensors; the base is never changed in place."""

import torch
from torch import Tensor

from deltamux.deltas.base_model import BaseModel
from deltamux.deltas.ops import DenseEmbedding, DenseHead
from deltamux.deltas.program import PlacedOp, Program
from deltamux.errors import InvalidAdapterError, NotMergeableError


def merge_program(program: Program, base: BaseModel) -> dict[str, Tensor]:
    """Returns the base parameters that the program changes, merged, by name and in the base's dtype.

    The arithmetic runs in float32 and the result is rounded once.

    Raises:
        NotMergeableError: an op cannot be merged into weights; the message has which and why.
        InvalidAdapterError: a merged weight is not finite.
    """
    merged: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        return merged[name] if name in merged else _tensor(base, name)

    for site, op in _untied(base, program.placed(base)):
        merged.update(op.merge(site, read))
    return {name: rounded(name, tensor, _tensor(base, name).dtype) for name, tensor in merged.items()}


def _untied(base: BaseModel, placed: list[PlacedOp]) -> list[PlacedOp]:
    """Leaves a tied head's changes out, after a check that they are the embedding's: both are one weight."""
    if base.head is None or base.head.tied_to is None:
        return placed
    tables = [op.weight for _, op in placed if isinstance(op, DenseEmbedding)]
    heads = [op.weight for _, op in placed if isinstance(op, DenseHead)]
    if len(tables) != len(heads) or not all(map(torch.equal, tables, heads)):
        raise NotMergeableError(
            f"the base ties {base.head.name} to {base.head.tied_to}, one weight for both, but the adapter changes them "
            "differently; serve it as an adapter instead",
            metadata={"site": base.head.name},
        )
    return [each for each in placed if not isinstance(each.op, DenseHead)]


def _tensor(base: BaseModel, name: str) -> Tensor:
    if not base.has_tensor(name):
        raise KeyError(name)
    return base.tensor(name)


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a merged weight in the dtype that it is kept in.

    Raises:
        InvalidAdapterError: it is not finite there.
    """
    kept = tensor.to(dtype)
    if not torch.isfinite(kept).all():
        raise InvalidAdapterError(
            f"merging makes {name} overflow in {dtype}: the adapter's change is too large for the base's dtype",
            reason="NOT_FINITE",
            metadata={"tensor": name},
        )
    return kept
