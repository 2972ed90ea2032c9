"""Throughput of the engine under mixed deltas, as ratios to the base in the same run.

    .venv/bin/python -m benchmarks.throughput --size tiny --output throughput.json     (in tests/)

32 sequences of 64 tokens a batch, bfloat16, every workload in turn and all of them --repeats times; the figure is the
median. Machines are noisy: only the ratios mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engine.worlds import saved
from server.tiny_base import byte_tokenizer

from deltamux.deltas import BaseModel, Bottleneck, KVPrefix, LowRank, NormAffine, Op, Program, Scale
from deltamux.engine.base import EngineOptions, ProgramRef, SamplingOptions
from deltamux.engine.vllm.engine import VLLMEngine

SEQUENCES = 32
NEW_TOKENS = 64


class Size(NamedTuple):
    hidden: int
    layers: int


SIZES = {"tiny": Size(512, 8), "mid": Size(1024, 12)}


def write_base(directory: Path, size: Size) -> Path:
    """Writes a random Llama of the given size in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128,
        intermediate_size=size.hidden * 11 // 4,
        vocab_size=8192,
        max_position_embeddings=2048,
    )
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it so
    model.to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def programs(base: BaseModel, directory: Path) -> dict[str, ProgramRef]:
    """Writes sixteen LoRAs of rank 8 and one adapter of each other mechanism."""
    hidden, small = base.dims.hidden_size, 0.02
    made = {f"lora-{i}": Program.of(_low_rank(base)) for i in range(16)}
    made["prefix"] = Program.of(
        (s.name, KVPrefix(*(torch.randn(16, s.num_kv_heads, s.head_dim) for _ in range(2)))) for s in base.attentions
    )
    rows: list[tuple[str, Op]] = [
        (b.name, Bottleneck(torch.randn(32, hidden) * small, torch.randn(hidden, 32) * small)) for b in base.blocks
    ]
    rows += ((n.name, NormAffine(torch.randn(hidden) * small)) for n in base.norms)
    made["houlsby"] = Program.of(rows)
    values = [s for s in base.linears if s.name.endswith(("k_proj", "v_proj"))]
    made["scale"] = Program.of((s.name, Scale(1 + torch.randn(s.out_features) * small)) for s in values)
    return {name: saved(program, directory, name) for name, program in made.items()}


def _low_rank(base: BaseModel) -> list[tuple[str, Op]]:
    return [
        (s.name, LowRank(torch.randn(8, s.in_features) * 0.02, torch.randn(s.out_features, 8) * 0.02))
        for s in base.linears
    ]


def workloads(refs: dict[str, ProgramRef]) -> dict[str, list[ProgramRef | None]]:
    loras: list[ProgramRef | None] = [refs[f"lora-{i}"] for i in range(16)]
    mixed = [*loras[:4], refs["prefix"], refs["houlsby"], refs["scale"], None]
    return {
        "base": [None],
        "1 LoRA": loras[:1],
        "4 LoRAs": loras[:4],
        "16 LoRAs": loras,
        "prefix": [refs["prefix"]],
        "scale": [refs["scale"]],
        "houlsby": [refs["houlsby"]],
        "all mixed": mixed,
    }


async def run(engine: VLLMEngine, adapters: list[ProgramRef | None], prompt_tokens: int, tag: str) -> float:
    """Returns generated tokens a second."""
    sampling = SamplingOptions(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)

    async def one(i: int) -> None:
        prompt = tuple((i * 37 + k * 13 + sum(tag.encode())) % 8000 for k in range(prompt_tokens))
        async for _ in engine.generate(prompt, sampling, adapters[i % len(adapters)], request_id=f"{tag}-{i}"):
            pass

    started = time.perf_counter()
    await asyncio.gather(*map(one, range(SEQUENCES)))
    return SEQUENCES * NEW_TOKENS / (time.perf_counter() - started)


async def measure(size: str, prompts: list[int], repeats: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        directory = write_base(Path(folder) / "base", SIZES[size])
        refs = programs(BaseModel.from_pretrained(directory), Path(folder))
        options = EngineOptions(
            str(directory), dtype="bfloat16", max_model_len=512, kv_cache_gib=1, max_active_adapters=20, max_num_seqs=32
        )
        engine = VLLMEngine(options)
        await engine.start()
        try:
            return [row for prompt in prompts for row in await _rows(engine, workloads(refs), prompt, repeats)]
        finally:
            await engine.stop()


async def _rows(
    engine: VLLMEngine, loads: dict[str, list[ProgramRef | None]], prompt: int, repeats: int
) -> list[dict[str, Any]]:
    figures: dict[str, list[float]] = {name: [] for name in loads}
    for repeat in range(repeats + 1):
        for name, adapters in loads.items():
            figure = await run(engine, adapters, prompt, f"{prompt}-{repeat}-{name}")
            if repeat:  # the first round warms up
                figures[name].append(figure)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return [
        {"prompt": prompt, "workload": name, "tokens_per_second": round(figure), "of_base": figure / medians["base"]}
        for name, figure in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 256], help="prompt lengths in tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args()
    rows = asyncio.run(measure(given.size, given.prompts, given.repeats))
    print(f"{'prompt':>6}  {'workload':10}  {'tokens/s':>8}  {'of base':>7}")
    for row in rows:
        print(f"{row['prompt']:6}  {row['workload']:10}  {row['tokens_per_second']:8}  {row['of_base']:7.2f}")
    if given.output:
        given.output.write_text(json.dumps({"size": given.size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
