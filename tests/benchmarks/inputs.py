"""What the suite measures with: a base of a given size, and adapters of every kind for it, in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deltamux.bench.floor import Floor, Work, floor
from deltamux.bench.run import compile_adapters
from deltamux.bench.traffic import Workload
from deltamux.deltas import BaseModel
from deltamux.engine.base import ProgramRef
from deltamux_testing.adapters import write_own
from deltamux_testing.tiny_base import byte_tokenizer

NUM_LORAS = 32
RANKS = (4, 8, 16, 32, 64, 4, 16, 64)
METHODS: dict[str, dict[str, Any]] = {
    "ia3": {},
    "bitfit": {},
    "prefix": {"num_virtual_tokens": 16},
    "ln_tuning": {},
    "houlsby": {"bottleneck": 32},
}


class Size(NamedTuple):
    """Of a Llama.

    Attributes:
        head: channels of an attention head; group: query heads of a key and value head.
        inner: of the feed-forward, as a multiple of `hidden`.
    """

    hidden: int
    layers: int
    head: int = 64
    group: int = 2
    inner: float = 2.75
    vocabulary: int = 8192


SIZES = {"tiny": Size(512, 8), "mid": Size(1024, 12)}


def write_base(directory: Path, size: Size) -> Path:
    """Writes a random Llama of the given size in bfloat16."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // size.head,
        num_key_value_heads=size.hidden // size.head // size.group,
        intermediate_size=int(size.hidden * size.inner),
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    return save_random(config, directory)


def save_random(config: Any, directory: Path) -> Path:
    """Writes a random model of a transformers config, and a tokenizer."""
    from transformers import AutoModelForCausalLM

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # random numbers take a CPU a minute and more
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it so
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Inputs:
    """A base and its adapters.

    Attributes:
        model: directory of the base.
        directories: the adapters' files by name, as PEFT or we write them: ``lora-0`` and on (rank 8, all linear),
            ``rank-0`` and on (ranks 4 to 64), and one of each method in METHODS under its name.
        programs: the same, compiled.
    """

    folder: Path
    model: Path
    base: BaseModel
    directories: Mapping[str, Path]
    programs: Mapping[str, ProgramRef]
    works: Mapping[str, Work]

    @classmethod
    def build(cls, model: Path, folder: Path) -> Inputs:
        base = BaseModel.from_pretrained(model)
        (compiled := folder / "compiled").mkdir(parents=True)
        directories = _write_adapters(base, folder / "adapters")
        made = compile_adapters(directories, base, compiled)
        works = {name: Work.of_program(each.program) for name, each in made.items()}
        return cls(folder, model, base, directories, {name: each.ref for name, each in made.items()}, works)

    def floor(self, workload: Workload) -> Floor:
        return floor(Work.of_base(self.base), self.works, workload)

    def loras(self, count: int) -> tuple[str, ...]:
        return tuple(f"lora-{i}" for i in range(count))

    @property
    def ranks(self) -> tuple[str, ...]:
        return tuple(f"rank-{i}" for i in range(len(RANKS)))

    @property
    def mixed(self) -> tuple[str | None, ...]:
        """Four LoRAs, one adapter of every other method, and the base."""
        return (*self.loras(4), *METHODS, None)


def _write_adapters(base: BaseModel, folder: Path) -> dict[str, Path]:
    given: dict[str, tuple[str, dict[str, Any]]] = {
        **{f"lora-{i}": ("lora", {"r": 8}) for i in range(NUM_LORAS)},
        **{f"rank-{i}": ("lora", {"r": rank}) for i, rank in enumerate(RANKS)},
        **{method: (method, options) for method, options in METHODS.items()},
    }
    return {
        name: write_own(method, base, folder / name, seed=seed, **options)
        for seed, (name, (method, options)) in enumerate(given.items())
    }
