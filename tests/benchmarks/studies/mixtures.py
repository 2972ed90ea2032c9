"""What delta support and adapters cost a step on a mixture of experts.

    python -m benchmarks.studies.mixtures --size mid --dtype float32 --output mixtures.json     (in tests/)

First the base without adapters, with delta support and without it (`studies.overhead`); then LoRA of rank 8 at
attention, or at attention and experts, against the same steps without adapters (`benchmarks.steps`). The floor counts
bytes: what the batch's adapters add to what the base reads, of both the experts alone that the rows of each are
expected to meet.
"""

import sys
import tempfile
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.command import machine, write_output
from benchmarks.inputs import save_random
from benchmarks.steps import SEQUENCES, AlternatingWorker, Engine, Row, parse, print_rows, row, step_pairs
from benchmarks.studies import overhead
from deltamux.bench.run import compile_adapters
from deltamux.deltas import BaseModel, Program
from deltamux_testing.adapters import write_own


class Size(NamedTuple):
    """Of a Qwen3 mixture: every layer has experts, of which each row meets some."""

    hidden: int
    layers: int
    inner: int
    experts: int = 32
    met: int = 4


SIZES = {"tiny": Size(512, 8, 352), "mid": Size(1024, 12, 704)}
ADAPTERS = 16


def write_base(directory: Path, size: Size) -> Path:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128,
        moe_intermediate_size=size.inner,
        num_experts=size.experts,
        num_experts_per_tok=size.met,
        norm_topk_prob=True,
        vocab_size=8192,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    return save_random(config, directory)


def write_adapters(base: BaseModel, folder: Path) -> dict[str, Path]:
    attention: dict[str, Any] = {"r": 8, "target_modules": r".*self_attn\.[qkvo]_proj"}
    experts = {**attention, "target_parameters": [site.name for site in base.experts]}
    return {
        f"{name}-{i}": write_own("lora", base, folder / f"{name}-{i}", seed=i, **options)
        for name, options in (("attention", attention), ("experts", experts))
        for i in range(ADAPTERS)
    }


WORKLOADS: dict[str, tuple[str, ...]] = {
    "16 LoRAs at attention": tuple(f"attention-{i}" for i in range(ADAPTERS)),
    "1 LoRA at experts too": ("experts-0",),
    "16 LoRAs at experts too": tuple(f"experts-{i}" for i in range(ADAPTERS)),
}


def bytes_floor(base: BaseModel, programs: Iterable[Program], size: Size) -> float:
    """Returns the share of the base's speed that is left if a batch's programs cost the bytes that it reads of them."""
    head = base.head.in_features * base.head.vocab_size if base.head else 0
    dense = head + sum(site.in_features * site.out_features for site in base.linears)
    inside = {site.name: site.num_experts * site.in_features * site.out_features for site in base.experts}
    read = dense + sum(inside.values()) * _share_met(SEQUENCES, size)
    batch = list(programs)
    met = _share_met(SEQUENCES // len(batch), size)
    more = sum(
        sum(tensor.numel() for tensor in op.tensors().values()) * (met if site in inside else 1.0)
        for program in batch
        for site, op in program
    )
    return read / (read + more)


def _share_met(rows: int, size: Size) -> float:
    """Returns the share of the experts that so many rows are expected to meet, each choosing at random."""
    return 1.0 - (1.0 - size.met / size.experts) ** rows


def measure(folder: Path, size: Size, tokens: int, repeats: int, dtype: str) -> tuple[Row, list[Row]]:
    model = write_base(folder / "base", size)
    alone = overhead.measure(model, tokens, repeats, dtype)
    base = BaseModel.from_pretrained(model)
    (compiled := folder / "compiled").mkdir()
    made = compile_adapters(write_adapters(base, folder / "adapters"), base, compiled)
    refs = {name: each.ref for name, each in made.items()}
    engine = Engine(model, refs, tokens, AlternatingWorker, dtype=dtype, auto_merge=False)
    pairs = step_pairs(engine, WORKLOADS, repeats)
    floors = {
        name: bytes_floor(base, (made[adapter].program for adapter in adapters), size)
        for name, adapters in WORKLOADS.items()
    }
    return alone, [row(name, pairs[name], f"{floors[name]:.3f}") for name in WORKLOADS]


def main() -> int:
    given = parse("benchmarks.studies.mixtures", __doc__, repeats=2, sizes=SIZES, tokens=160)
    size = SIZES[given.size]
    with tempfile.TemporaryDirectory() as folder:
        alone, rows = measure(Path(folder), size, given.tokens, given.repeats, given.dtype)
    print(f"{given.size} mixture ({size.met} of {size.experts} experts), {machine()}, {date.today()}: steps of 32 rows")
    overhead.print_overhead(alone)
    print_rows(rows)
    write_output(given.output, [each._asdict() for each in (alone, *rows)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
