"""Sites of decoders of unusual structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bases.configs import EXPERTS, SLIDING, base_config
from deltamux.deltas import BaseModel

MIXTURES = {
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},  # its shared MLP runs before the router, which is first
    "afmoe": {**EXPERTS, **SLIDING, "num_dense_layers": 1, "num_shared_experts": 1},
    "qwen2_moe": {},
    "dots1": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
}


@pytest.mark.parametrize(("name", "values"), MIXTURES.items())
def test_what_a_sub_layer_reads_is_there_before_its_output(name: str, values: Mapping[str, Any]) -> None:
    config = base_config(name, values)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]  # transformers
    blocks = BaseModel.from_config(config).blocks
    ran: list[str] = []
    modules = dict(model.named_modules())

    def note(path: str) -> None:
        modules[path].register_forward_pre_hook(lambda module, args: ran.append(path))

    for path in {path for block in blocks for path in (block.input_module, block.output_module)}:
        note(path)
    with torch.no_grad():
        model(torch.tensor([[5, 17, 99]]))
    assert blocks
    for block in blocks:
        assert ran.index(block.input_module) < ran.index(block.output_module), block
