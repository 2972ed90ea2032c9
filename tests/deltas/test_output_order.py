"""Ops at a projection whose outputs an engine holds in another order than the base."""

import pytest
import torch

from deltamux.deltas import BlockRole, LinearSite
from deltamux.deltas.ops import OPS, Bias, Dense, GatedLowRank, LowRank, Op, Scale, ScaleInput, SignDense
from deltamux.deltas.sites import SiteKind

SITE = LinearSite("q", 8, 6, has_bias=True, transposed=False, layer=0, block=BlockRole.ATTENTION)
DRAWN = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=DRAWN)


AT_PROJECTIONS: list[Op] = [
    LowRank(draw(2, 8), draw(6, 2), 0.5),
    GatedLowRank(draw(2, 8), draw(6, 2), gate_weight=draw(8), gate_bias=draw(1)),
    Dense(draw(6, 8)),
    SignDense(torch.randint(0, 256, (6, 1), dtype=torch.uint8, generator=DRAWN), 0.3),
    Scale(draw(6)),
    ScaleInput(draw(8)),
    Bias(draw(6)),
]


@pytest.mark.parametrize("op", AT_PROJECTIONS, ids=lambda op: str(op.name))
def test_a_reordered_op_changes_reordered_outputs_as_the_op_does(op: Op) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    x, y = draw(4, 8), draw(4, 6)
    assert torch.allclose(op.reordered(order).apply(x, y[:, order], SITE), op.apply(x, y, SITE)[:, order])


def test_every_op_at_projections_has_its_order_and_an_op_derived_from_one_has_none() -> None:
    class Other(LowRank):
        """An op of a plugin's own, with another formula."""

    assert {type(op) for op in AT_PROJECTIONS} == {op for op in OPS.values() if op.site_kind is SiteKind.LINEAR}
    assert Other.output_rows is None
