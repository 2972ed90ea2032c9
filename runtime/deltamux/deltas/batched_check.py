"""The batched check: the batch of each op must compute what `apply` does, for its own rows alone.

A plugin's op runs in a step that all adapters share. What raises, leaks into other rows or computes something else than
was trained is found here, when its adapter is uploaded.
"""

from typing import Any

import torch
from torch import Tensor

from deltamux.deltas.ops import OPS, Op, RowRange, StepIndex, op_class
from deltamux.deltas.program import PlacedOp
from deltamux.deltas.sites import BlockSite, EmbeddingSite, HeadSite, LinearSite, NormSite, Site
from deltamux.errors import DeltamuxError, InvalidAdapterError, PluginError

SLOTS = 3
STEPS = ((RowRange(1, 0, 1),), (RowRange(1, 1, 4), RowRange(1, 6, 9)))
"""A decode step and a prefill step with rows of the base between the adapter's."""
ROWS = 10
TOLERANCE = 1e-4


def check_batched(placed: list[PlacedOp], *, foreign_only: bool = True) -> None:
    """Runs each class of op once per class of site.

    Args:
        foreign_only: leave deltamux's own ops out, which tests check.
    Raises:
        PluginError: an op fails, changes rows of others, or computes in a batch what it does not alone.
        InvalidAdapterError: an op is not registered, or is at a site that only deltamux's own ops can change.
    """
    seen: set[tuple[type[Op], type[Site]]] = set()
    for site, op in placed:
        kind = (type(op), type(site))
        if kind in seen or (foreign_only and OPS.get(op.name) is type(op)):
            continue
        seen.add(kind)
        _check_op(site, op)


def _check_op(site: Site, op: Op) -> None:
    if op_class(op.name) is not type(op):
        raise InvalidAdapterError(f"op {op.name!r} is {op_class(op.name).__qualname__}, not {type(op).__qualname__}")
    if op.virtual_tokens():
        if OPS.get(op.name) is type(op):
            return
        raise InvalidAdapterError(f"op {op.name!r} puts virtual tokens before the prompt: plugins' ops cannot yet")
    try:
        for row_ranges in STEPS:
            _compare(site, op.to(torch.float32), StepIndex(row_ranges, ROWS, SLOTS))
    except DeltamuxError:
        raise
    except Exception as error:
        raise _failed(op, site, f"fails: {type(error).__name__}: {error}") from error


def _compare(site: Site, op: Op, step: StepIndex) -> None:
    x, before = _rows(site)
    batch = type(op).batch(site, SLOTS, torch.float32, "cpu")
    batch.set(1, op)
    if batch.mask != 0b10:
        raise _failed(op, site, "does not keep its batch's mask")
    after = (x if op.changes_input else before).clone()
    start = after.clone()
    batch.apply(x, after, step)
    own = torch.zeros(ROWS, dtype=torch.bool)
    for _, first, stop in step.row_ranges:
        own[first:stop] = True
    expected = op.apply_input(x[own], site) if op.changes_input else op.apply(x[own], before[own], site)
    if not torch.equal(after[~own], start[~own]):
        raise _failed(op, site, "changes rows of other adapters")
    if not torch.allclose(after[own], expected, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True):
        raise _failed(op, site, "computes in a batch what it does not alone")
    batch.reset(1)
    batch.apply(x, after := start.clone(), step)
    if not torch.equal(after, start):
        raise _failed(op, site, "still changes rows after its slot was reset")


def _rows(site: Site) -> tuple[Tensor, Tensor]:
    """Returns inputs and outputs of a site for a step of ROWS rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(features: int) -> Tensor:
        return torch.randn(ROWS, features, generator=generator)

    if isinstance(site, LinearSite):
        return draw(site.in_features), draw(site.out_features)
    if isinstance(site, HeadSite):
        return draw(site.in_features), draw(site.vocab_size)
    if isinstance(site, EmbeddingSite):
        return torch.randint(site.vocab_size, (ROWS,), generator=generator), draw(site.features)
    if isinstance(site, NormSite | BlockSite):
        return draw(site.features), draw(site.features)
    raise InvalidAdapterError(f"only deltamux's own ops change {site.kind} sites; {site.name} is one")


def _failed(op: Op, site: Any, problem: str) -> PluginError:
    return PluginError(
        f"op {op.name!r} at {site.name} {problem}", metadata={"op": op.name, "site": site.name}, reason="OP_FAILED"
    )
