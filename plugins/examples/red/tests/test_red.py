"""RED passes every check of deltamux's conformance suite, and is the formula of its paper."""

import pytest
import torch
from deltamux_red.edit import Edit

from deltamux.conformance import CHECKS, cases, check_serving
from deltamux.deltas.batched_check import check_batched


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("case", cases("red"), ids=str)
def test_every_check_passes(case, check):
    check(case)


def test_what_is_served_is_what_was_trained():
    check_serving(cases("red"))


def test_the_op_scales_and_shifts():
    y = torch.randn(3, 8)
    factor, bias = torch.randn(8), torch.randn(8)
    torch.testing.assert_close(Edit(factor, bias).apply(y, y, None), factor * y + bias)


def test_the_op_touches_no_other_rows():
    (case, *_) = cases("red")
    check_batched(case.program(case.checkpoint()).placed(case.base))
