"""The engines that are compared, each started, loaded with every workload in turn, and stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

from benchmarks.gpu.material import LORAS, Material
from deltamux.engine.base import EngineOptions, SamplingOptions
from deltamux.engine.vllm.engine import VLLMEngine

MAX_MODEL_LEN = 2048
SLOTS = 20


class Load(NamedTuple):
    """How every workload is run."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    kv_cache_gib: float

    @property
    def kv_cache_bytes(self) -> int:
        return int(self.kv_cache_gib * 2**30)


class Measured(NamedTuple):
    """Generated tokens a second of one workload, one figure a round."""

    engine: str
    workload: str
    figures: list[float]


Generate = Callable[[tuple[int, ...], Any, str], Awaitable[None]]
"""Generates for one prompt with one adapter (or None), under a request id."""


async def _rounds(name: str, generate: Generate, loads: Mapping[str, Sequence[Any]], load: Load) -> list[Measured]:
    measured = {workload: Measured(name, workload, []) for workload in loads}
    for turn in range(load.repeats + 1):
        for workload, adapters in loads.items():
            tag = f"{name}-{turn}-{workload}"
            started = time.perf_counter()
            await asyncio.gather(
                *(
                    generate(_prompt(tag, i, load.prompt_tokens), adapters[i % len(adapters)], f"{tag}-{i}")
                    for i in range(load.sequences)
                )
            )
            if turn:  # the first round warms up
                figure = load.sequences * load.new_tokens / (time.perf_counter() - started)
                measured[workload].figures.append(figure)
    return list(measured.values())


def _prompt(tag: str, index: int, length: int) -> tuple[int, ...]:
    """Returns token ids that no other request has, so that no prefix cache answers."""
    start = sum(tag.encode()) + 7919 * index
    return tuple(3 + (start + 104_729 * k) % 30_000 for k in range(length))


async def plain_vllm(material: Material, load: Load, *, lora: bool) -> list[Measured]:
    """vLLM as it comes: compiled, with CUDA graphs; with or without its own LoRA."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0.0, max_tokens=load.new_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    requests = [LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(material.peft)]
    loads: dict[str, list[Any]] = {"base": [None]}
    options: dict[str, Any] = {}
    if lora:
        loads |= _lora_loads(requests)
        options = {"enable_lora": True, "max_loras": SLOTS, "max_lora_rank": 64}

    async with _started_vllm(material, load, options) as llm:

        async def generate(prompt: tuple[int, ...], adapter: Any, request_id: str) -> None:
            tokens = TokensPrompt(prompt_token_ids=list(prompt))
            async for _ in llm.generate(tokens, sampling, request_id, lora_request=adapter):
                pass

        return await _rounds("vllm lora" if lora else "vllm", generate, loads, load)


@asynccontextmanager
async def _started_vllm(material: Material, load: Load, options: Mapping[str, Any]) -> AsyncIterator[Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(material.base),
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=load.sequences,
        disable_log_stats=True,
        kv_cache_memory_bytes=load.kv_cache_bytes,
        **options,
    )
    llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
    try:
        yield llm
    finally:
        await asyncio.to_thread(llm.shutdown)


async def deltas(material: Material, load: Load, *, graphs: bool) -> list[Measured]:
    """Our engine, eagerly or with CUDA graphs, with every mechanism and all of them mixed."""
    refs = material.programs
    loras = [refs[f"lora-{i}"] for i in range(LORAS)]
    others = {name: [refs[name]] for name in ("houlsby", "scale", "prefix")}
    mixed = [*loras[:4], refs["houlsby"], refs["scale"], refs["prefix"], None]
    loads: dict[str, list[Any]] = {"base": [None], **_lora_loads(loras), **others, "mixed": mixed}
    engine = VLLMEngine(
        EngineOptions(
            str(material.base),
            dtype="bfloat16",
            device="cuda",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=load.sequences,
            max_active_adapters=SLOTS,
            engine_arguments={"enforce_eager": not graphs, "kv_cache_memory_bytes": load.kv_cache_bytes},
        )
    )
    sampling = SamplingOptions(max_tokens=load.new_tokens, temperature=0.0, ignore_eos=True)

    async def generate(prompt: tuple[int, ...], adapter: Any, request_id: str) -> None:
        async for _ in engine.generate(prompt, sampling, adapter, request_id=request_id):
            pass

    await engine.start()
    try:
        return await _rounds("deltas graphs" if graphs else "deltas eager", generate, loads, load)
    finally:
        await engine.stop()


def _lora_loads(loras: Sequence[Any]) -> dict[str, list[Any]]:
    return {"1 LoRA": list(loras[:1]), "4 LoRAs": list(loras[:4]), "16 LoRAs": list(loras)}


ENGINES: dict[str, Callable[[Material, Load], Awaitable[list[Measured]]]] = {
    "vllm": partial(plain_vllm, lora=False),
    "vllm-lora": partial(plain_vllm, lora=True),
    "deltas-eager": partial(deltas, graphs=False),
    "deltas-graphs": partial(deltas, graphs=True),
}
