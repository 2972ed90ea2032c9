"""Adapters for the tests: written by PEFT itself where PEFT has the method, by our own method where it has not.

All are randomised away from their fresh state, so that each visibly changes what its base generates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from deltamux.deltas import BaseModel, Checkpoint, Program
from deltamux.errors import DeltamuxError
from deltamux.registry import Registry

ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
RMS = ["input_layernorm", "post_attention_layernorm", "norm"]
NORMS = {
    "llama": RMS,
    "qwen2": RMS,
    "qwen3": RMS[:1],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
}
ARCHITECTURES = tuple(ATTENTION)


def _lora(**options: Any) -> Callable[[str], peft.PeftConfig]:
    def config(architecture: str) -> peft.PeftConfig:
        chosen = {"target_modules": "all-linear", "fan_in_fan_out": architecture == "gpt2", **options}
        return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **chosen)

    return config


def _adalora(architecture: str) -> peft.PeftConfig:
    return peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=10,
        target_modules=ATTENTION[architecture],
        fan_in_fan_out=architecture == "gpt2",
        task_type="CAUSAL_LM",
    )


def _targeting(kind: Any, **options: Any) -> Callable[[str], peft.PeftConfig]:
    def config(architecture: str) -> peft.PeftConfig:
        named: peft.PeftConfig = kind(target_modules=ATTENTION[architecture], task_type="CAUSAL_LM", **options)
        if hasattr(named, "fan_in_fan_out"):
            named.fan_in_fan_out = architecture == "gpt2"
        return named

    return config


def _prune(model: Any) -> None:
    """Leaves ranks 0 to 4 of an AdaLoRA, as its own pruning would."""
    values = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    pattern = {name: [rank < index % 5 for rank in range(4)] for index, name in enumerate(values)}
    model.peft_config["default"].rank_pattern = pattern
    for name, parameter in model.base_model.model.named_parameters():
        if name in pattern:
            parameter.data[~torch.tensor(pattern[name])] = 0.0


PEFT_ADAPTERS: dict[str, Callable[[str], peft.PeftConfig]] = {
    "lora-all-linear": _lora(lora_alpha=16),
    "lora-attention": lambda architecture: _lora(target_modules=ATTENTION[architecture])(architecture),
    "lora-patterns": _lora(rank_pattern={r".*\.0\..*": 2}, alpha_pattern={r".*\.1\..*": 32}),
    "lora-one-layer": lambda architecture: _lora(target_modules=ATTENTION[architecture], layers_to_transform=[1])(
        architecture
    ),
    "rslora": _lora(use_rslora=True),
    "lora-bias-all": _lora(bias="all"),
    "lora-bias-own": _lora(bias="lora_only"),
    "dora": _lora(use_dora=True, lora_alpha=16),
    "dora-rslora": _lora(use_dora=True, use_rslora=True),
    "adalora": _adalora,
    "adalora-pruned": _adalora,
    "vera": _targeting(peft.VeraConfig, r=16),
    "vera-from-seed": _targeting(peft.VeraConfig, r=16, save_projection=False, projection_prng_key=3),
    "loha": _targeting(peft.LoHaConfig, r=3),
    "loha-patterns": _targeting(peft.LoHaConfig, r=3, rank_pattern={r".*\.0\..*": 2}, alpha_pattern={r".*\.1\..*": 32}),
    "lokr": _targeting(peft.LoKrConfig, r=2),
    "lokr-both": _targeting(peft.LoKrConfig, r=2, decompose_both=True, decompose_factor=4),
    "oft": _targeting(peft.OFTConfig, oft_block_size=8),
    "oft-exact": _targeting(peft.OFTConfig, r=4, oft_block_size=0, use_cayley_neumann=False),
    "oft-shared": _targeting(peft.OFTConfig, oft_block_size=16, block_share=True),
    "oft-constrained": _targeting(peft.OFTConfig, oft_block_size=16, coft=True, eps=0.5),
    "bridged-delora": _targeting(peft.DeloraConfig, r=4),
    "bridged-c3a": _targeting(peft.C3AConfig, block_size=16),
    "bridged-fourierft": _targeting(peft.FourierFTConfig, n_frequency=50),
    "bridged-deft": _targeting(peft.DeftConfig, r=4),
    "bridged-miss": _targeting(peft.MissConfig, r=8),
    "bridged-randlora": _targeting(peft.RandLoraConfig, r=4),
    "bridged-shira": _targeting(peft.ShiraConfig, r=4),
    "bridged-vblora": _targeting(peft.VBLoRAConfig, vector_length=16, num_vectors=20),
    "ia3": lambda architecture: peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=architecture == "gpt2"),
    "ln-tuning": lambda architecture: peft.LNTuningConfig(target_modules=NORMS[architecture], task_type="CAUSAL_LM"),
    "prompt": lambda _: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning-mlp": lambda _: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=24, task_type="CAUSAL_LM"
    ),
    "p-tuning-lstm": lambda _: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=24, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM"
    ),
    "prefix": lambda _: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix-projected": lambda _: peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24, task_type="CAUSAL_LM"
    ),
}


DISTINCT = (
    *("lora-all-linear", "lora-attention", "lora-one-layer", "lora-bias-all", "lora-bias-own", "dora"),
    *("adalora-pruned", "vera", "loha", "lokr", "oft", "bridged-deft", "ia3", "ln-tuning"),
    *("prompt", "p-tuning-mlp", "prefix"),
)
"""One adapter of each method, and one for each set of ops and sites: others are the same to an engine."""

BRIDGED_ON_LINEAR = ("bridged-delora", "bridged-c3a", "bridged-miss", "bridged-shira")
ONLY_ON_LINEAR = ("loha", "lokr", "oft", *BRIDGED_ON_LINEAR)
"""What PEFT itself does not attach to GPT-2's transposed projections."""


def peft_adapters(architecture: str) -> list[str]:
    """Returns the names of PEFT_ADAPTERS that PEFT can make for an architecture."""
    return [name for name in PEFT_ADAPTERS if architecture != "gpt2" or not name.startswith(ONLY_ON_LINEAR)]


def write_peft(name: str, architecture: str, base: Path, directory: Path) -> Any:
    """Writes one of PEFT_ADAPTERS as PEFT saves it, and returns PEFT's model, in evaluation mode."""
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), PEFT_ADAPTERS[name](architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if name.endswith("-pruned"):
        _prune(model)
    model.save_pretrained(str(directory))
    return model.eval()


@cache
def registry() -> Registry:
    """The methods that are installed: found once, since that takes longer than to read an adapter."""
    return Registry()


def write_own(method_name: str, base: BaseModel, directory: Path, *, seed: int = 1, **options: Any) -> Path:
    """Writes an adapter of any method with random parameters, as our trainer would."""
    method = registry().get(method_name)
    config = method.parse(options)
    generator = torch.Generator().manual_seed(seed)
    specs = method.parameters(config, base)
    parameters = {name: 0.15 * torch.randn(spec.shape, generator=generator) for name, spec in specs.items()}
    method.checkpoint(config, base, method.export(config, base, parameters)).write(directory)
    return directory


def read_program(directory: Path, base: BaseModel) -> Program:
    """Reads an adapter's directory the way an upload does."""
    return registry().load(directory, base).program


def read_adapter(checkpoint: Checkpoint, base: BaseModel) -> Program:
    """Reads an adapter's content the way an upload does."""
    return registry().load(checkpoint, base).program


def refusal(values: dict[str, Any], base: BaseModel, tensors: dict[str, torch.Tensor] | None = None) -> DeltamuxError:
    """Returns what reading an adapter of that content raises: a message of bounded length."""
    with pytest.raises(DeltamuxError) as refused:
        read_adapter(Checkpoint(values, {"stray": torch.zeros(1)} if tensors is None else tensors), base)
    assert len(refused.value.message) < 1500
    return refused.value
