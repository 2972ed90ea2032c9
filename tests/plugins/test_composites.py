"""MAM and UniPELT against their formulas, written out in plain torch on a Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from deltamux.deltas import BaseModel
from deltamux.errors import InvalidAdapterError, InvalidConfigError
from deltamux.registry import Registry
from deltamux_testing.adapters import write_own
from deltamux_testing.training import IDS, logits

LAYERS = range(2)


class ByHand:
    """A Llama with the formulas of a paper written into it."""

    def __init__(self, base_directory: Path, adapter: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(base_directory)
        self.tensors = load_file(adapter / "adapter_model.safetensors")

    def hook(self, module: Any, change: Any) -> None:
        module.register_forward_hook(lambda _, args, y: y + change(args[0], y))

    def gate(self, name: str, z: Tensor) -> Tensor:
        weight, bias = self.tensors[f"gates.{name}.weight"], self.tensors[f"gates.{name}.bias"]
        return torch.sigmoid((z * weight).sum(-1, keepdim=True) + bias)

    def logits(self, prefixes: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Runs IDS after keys and values [n, heads, size] of each layer."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(prefixes):
            cache.update(key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0), layer)
        mask = torch.ones(1, prefixes[0][0].shape[0] + IDS.shape[1], dtype=torch.long)
        with torch.no_grad():
            found: Tensor = self.model(IDS, past_key_values=cache, attention_mask=mask).logits
        return found


def pairs(flat: Tensor, base: BaseModel) -> list[tuple[Tensor, Tensor]]:
    """Cuts PEFT's layout of a prefix into a key and a value a layer."""
    shaped = flat.view(flat.shape[0], 2 * len(LAYERS), base.dims.num_kv_heads, base.dims.head_dim)
    return [(shaped[:, 2 * layer], shaped[:, 2 * layer + 1]) for layer in LAYERS]


def test_mam_is_a_prefix_and_a_bottleneck_parallel_to_every_feed_forward(
    base_directory: Path, base: BaseModel, tmp_path: Path
) -> None:
    write_own("mam", base, tmp_path, prefix={"num_virtual_tokens": 4}, parallel={"bottleneck": 6, "scale": 3.0})
    hand = ByHand(base_directory, tmp_path)
    for layer in LAYERS:
        part = {n.rpartition("feed_forward.")[2]: t for n, t in hand.tensors.items() if f"layers.{layer}.feed" in n}

        def change(x: Tensor, y: Tensor, part: dict[str, Tensor] = part) -> Tensor:
            inner = torch.relu(x @ part["down.weight"].t() + part["down.bias"])
            return 3.0 * (inner @ part["up.weight"].t() + part["up.bias"])

        hand.hook(hand.model.model.layers[layer].mlp, change)
    expected = hand.logits(pairs(hand.tensors["prefix.prompt_embeddings"], base))
    torch.testing.assert_close(logits(base_directory, tmp_path), expected, atol=1e-4, rtol=1e-4)


def test_unipelt_is_its_three_components_each_with_its_gate(
    base_directory: Path, base: BaseModel, tmp_path: Path
) -> None:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    options: dict[str, Any] = {"prefix": {"num_virtual_tokens": 4}, "adapter": {"bottleneck": 6}, "lora": lora}
    write_own("unipelt", base, tmp_path, **options)
    hand = ByHand(base_directory, tmp_path)
    prefixes = []
    for layer in LAYERS:
        block = hand.model.model.layers[layer]
        for projection in ("q_proj", "v_proj"):
            path = f"model.layers.{layer}.self_attn.{projection}"
            a, b = (hand.tensors[f"lora.base_model.model.{path}.lora_{part}.weight"] for part in "AB")

            def low_rank(x: Tensor, y: Tensor, path: str = path, a: Tensor = a, b: Tensor = b) -> Tensor:
                return hand.gate(path, x) * (8 / 4) * (x @ a.t() @ b.t())

            hand.hook(getattr(block.self_attn, projection), low_rank)
        name = f"layers.{layer}.feed_forward"
        part = {n.removeprefix(f"adapter.{name}."): t for n, t in hand.tensors.items() if f"adapter.{name}" in n}

        def bottleneck(x: Tensor, y: Tensor, name: str = name, part: dict[str, Tensor] = part) -> Tensor:
            inner = torch.nn.functional.gelu(y @ part["down.weight"].t() + part["down.bias"])
            return hand.gate(name, y) * (inner @ part["up.weight"].t() + part["up.bias"])

        hand.hook(block.mlp, bottleneck)
        key, value = pairs(hand.tensors["prefix.prompt_embeddings"], base)[layer]
        opening = torch.sigmoid(hand.tensors[f"gates.layers.{layer}.attention"])
        prefixes.append((opening * key, opening * value))
    torch.testing.assert_close(logits(base_directory, tmp_path), hand.logits(prefixes), atol=1e-4, rtol=1e-4)


def test_a_gate_never_looks_at_tokens_to_come(base_directory: Path, base: BaseModel, tmp_path: Path) -> None:
    write_own("unipelt", base, tmp_path)
    whole, part = logits(base_directory, tmp_path), logits(base_directory, tmp_path, IDS[:, :3])
    torch.testing.assert_close(whole[:, :3], part, atol=1e-5, rtol=1e-5)


def test_what_unipelt_has_no_gate_for_is_refused() -> None:
    for lora in ({"use_dora": True}, {"bias": "all"}):
        with pytest.raises(InvalidConfigError, match="neither magnitudes"):
            Registry().get("unipelt").parse({"lora": lora})


def test_a_width_that_is_not_the_configs_is_refused(base: BaseModel, tmp_path: Path) -> None:
    write_own("houlsby", base, tmp_path, bottleneck=6)
    method = Registry().get("houlsby")
    with pytest.raises(InvalidAdapterError, match="says width 7"):
        method.program(method.parse({"bottleneck": 7}), base, load_file(tmp_path / "adapter_model.safetensors"))
