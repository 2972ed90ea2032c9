"""What the benchmark runs on: a random base, and adapters as vLLM and as deltamux read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from deltamux.deltas import BaseModel, Bottleneck, Checkpoint, KVPrefix, LowRank, NormAffine, Op, Program, Scale
from deltamux.engine.base import ProgramRef
from deltamux_testing.random_programs import saved
from deltamux_testing.tiny_base import byte_tokenizer

LORAS = 16
WIDTH = 32
PREFIX = 16


class Size(NamedTuple):
    """Of a Llama with heads of 128 channels, four query heads a key-value head, and a vocabulary of 32,000."""

    hidden: int
    layers: int


SIZES = {"tiny": Size(512, 2), "small": Size(1024, 12), "1b": Size(2048, 18), "8b": Size(4096, 32)}


class GPUInputs(NamedTuple):
    """Files of the base and of its adapters.

    Attributes:
        peft: LoRAs as PEFT's directories; programs: the same LoRAs, and one adapter of each other mechanism.
        rank: of every LoRA.
    """

    base: Path
    rank: int
    peft: list[Path]
    programs: dict[str, ProgramRef]

    @classmethod
    def write(cls, folder: Path, size: Size, rank: int) -> Self:
        directory = _write_base(folder / "base", size)
        base = BaseModel.from_pretrained(directory)
        loras = [_low_rank(base, rank) for _ in range(LORAS)]
        peft = [_write_peft(folder / f"peft-{i}", lora, rank) for i, lora in enumerate(loras)]
        made = {f"lora-{i}": Program.of(lora) for i, lora in enumerate(loras)} | _others(base)
        return cls(directory, rank, peft, {name: saved(program, folder, name) for name, program in made.items()})


def _write_base(directory: Path, size: Size) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 128,
        num_key_value_heads=size.hidden // 512,
        intermediate_size=size.hidden * 7 // 2,
        vocab_size=32_000,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # random numbers take a CPU a minute and more
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it so
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def _low_rank(base: BaseModel, rank: int) -> list[tuple[str, LowRank]]:
    return [
        (s.name, LowRank(torch.randn(rank, s.in_features) * 0.02, torch.randn(s.out_features, rank) * 0.02))
        for s in base.linears
    ]


def _write_peft(directory: Path, lora: list[tuple[str, LowRank]], rank: int) -> Path:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in lora}),
        "bias": "none",
    }
    tensors = {f"base_model.model.{name}.lora_A.weight": op.a for name, op in lora}
    tensors |= {f"base_model.model.{name}.lora_B.weight": op.b for name, op in lora}
    Checkpoint(config, tensors).write(directory)
    return directory


def _others(base: BaseModel) -> dict[str, Program]:
    hidden, small = base.dims.hidden_size, 0.02
    houlsby: list[tuple[str, Op]] = [
        (b.name, Bottleneck(torch.randn(WIDTH, hidden) * small, torch.randn(hidden, WIDTH) * small))
        for b in base.blocks
    ]
    houlsby += ((n.name, NormAffine(torch.randn(hidden) * small)) for n in base.norms)
    prefix = (
        (s.name, KVPrefix(*(torch.randn(PREFIX, s.num_kv_heads, s.head_dim) for _ in range(2))))
        for s in base.attentions
    )
    values = (s for s in base.linears if s.name.endswith(("k_proj", "v_proj")))
    scale = ((s.name, Scale(1 + torch.randn(s.out_features) * small)) for s in values)
    return {"houlsby": Program.of(houlsby), "prefix": Program.of(prefix), "scale": Program.of(scale)}
