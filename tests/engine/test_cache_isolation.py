"""What an adapter leaves in the cache reaches no other request: also values that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bases.configs import save_base
from deltamux.conformance.parity import assert_same, served
from deltamux.deltas import BaseModel, LowRank, Program
from deltamux_testing.engines import started
from deltamux_testing.random_programs import saved

PROMPT = (5, 17, 99, 200, 3, 42, 77)
HUGE = 1e25
"""Finite, as an upload has to be; what it makes of any input overflows."""


@pytest.mark.engine
@pytest.mark.parametrize("values", [{}, {"sliding_window": 8}], ids=["whole", "sliding"])
async def test_values_that_overflow_stay_in_their_own_requests(values: Mapping[str, Any], tmp_path: Path) -> None:
    directory = save_base(tmp_path / "base", "mistral", values)
    site = next(s for s in BaseModel.from_pretrained(directory).linears if s.name.endswith("1.self_attn.v_proj"))
    change = LowRank(torch.full((4, site.in_features), HUGE), torch.full((site.out_features, 4), HUGE))
    ref = saved(Program.of([(site.name, change)]), tmp_path, "huge")
    async with started(directory, enforce_eager=True) as engine:
        before = await served(engine, PROMPT, None, 4, "before")
        for attempt in range(4):
            await served(engine, PROMPT, ref, 4, f"huge-{attempt}")
            assert_same(before, await served(engine, PROMPT, None, 4, f"after-{attempt}"))
