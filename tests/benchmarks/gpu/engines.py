"""The engines that are compared: how each starts, what it is loaded with, and how it generates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.gpu.inputs import LORAS, GPUInputs
from deltamux.engine.base import EngineOptions, SamplingOptions
from deltamux.engine.vllm.frontend.engine import VLLMEngine

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

MAX_MODEL_LEN = 2048
SLOTS = 20


class Load(NamedTuple):
    """How every workload is run, and what memory an engine may take.

    Attributes:
        share: of the device's memory, which must be free before vLLM starts.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    kv_cache_gib: float
    share: float

    @property
    def memory(self) -> dict[str, Any]:
        """vLLM's arguments; the KV cache's size is given, so that engines on the same device change nothing."""
        return {"kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30), "gpu_memory_utilization": self.share}


Generate = Callable[[tuple[int, ...], Any, str], Awaitable[None]]
"""Generates for one prompt with one adapter (or None), under a request id."""


class Started(NamedTuple):
    """An engine that takes requests, and its workloads: the adapters that a workload's requests have in turn."""

    workloads: Mapping[str, Sequence[Any]]
    generate: Generate


def _vllm_starter(inputs: GPUInputs, load: Load, lora: bool) -> Callable[[], AsyncLLM]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options = load.memory
    if lora:
        options |= {"enable_lora": True, "max_loras": SLOTS, "max_lora_rank": inputs.rank}
    arguments = AsyncEngineArgs(
        model=str(inputs.base),
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=load.sequences,
        disable_log_stats=True,
        **options,
    )
    return partial(AsyncLLM.from_engine_args, arguments)


@asynccontextmanager
async def plain_vllm(inputs: GPUInputs, load: Load, *, lora: bool) -> AsyncIterator[Started]:
    """vLLM as it comes: compiled, with CUDA graphs; with or without its own LoRA."""
    # Exceptions that imports keep hold the frames around them. An engine in such a frame would outlive Python's end,
    # where its finalizer fails: so imports have a call of their own, in a thread whose frames have no engine.
    start = await asyncio.to_thread(_vllm_starter, inputs, load, lora)
    llm = await asyncio.to_thread(start)

    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0.0, max_tokens=load.new_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    requests = [LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(inputs.peft)]

    async def generate(prompt: tuple[int, ...], adapter: Any, request_id: str) -> None:
        tokens = TokensPrompt(prompt_token_ids=list(prompt))
        async for _ in llm.generate(tokens, sampling, request_id, lora_request=adapter):
            pass

    try:
        yield Started({"base": [None], **(_loras(requests) if lora else {})}, generate)
    finally:
        llm.shutdown()  # in the loop itself, whose tasks would else report the engine's end as a failure


@asynccontextmanager
async def deltas(inputs: GPUInputs, load: Load, *, graphs: bool) -> AsyncIterator[Started]:
    """Our engine, eagerly or compiled with CUDA graphs, with every mechanism and all of them mixed."""
    refs = inputs.programs
    loras = [refs[f"lora-{i}"] for i in range(LORAS)]
    others = {name: [refs[name]] for name in ("houlsby", "scale", "prefix")}
    mixed = [*loras[:4], refs["houlsby"], refs["scale"], refs["prefix"], None]
    engine = VLLMEngine(
        EngineOptions(
            str(inputs.base),
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=load.sequences,
            max_active_adapters=SLOTS,
            engine_arguments={"enforce_eager": not graphs, **load.memory},
        )
    )
    sampling = SamplingOptions(max_tokens=load.new_tokens, temperature=0.0, ignore_eos=True)

    async def generate(prompt: tuple[int, ...], adapter: Any, request_id: str) -> None:
        async for _ in engine.generate(prompt, sampling, adapter, request_id=request_id, stream=False):
            pass

    await engine.start()
    try:
        yield Started({"base": [None], **_loras(loras), **others, "mixed": mixed}, generate)
    finally:
        await engine.stop()


def _loras(loras: Sequence[Any]) -> dict[str, list[Any]]:
    return {"1 LoRA": list(loras[:1]), "4 LoRAs": list(loras[:4]), "16 LoRAs": list(loras)}


ENGINES: dict[str, Callable[[GPUInputs, Load], AbstractAsyncContextManager[Started]]] = {
    "vllm": partial(plain_vllm, lora=False),
    "vllm-lora": partial(plain_vllm, lora=True),
    "deltas-eager": partial(deltas, graphs=False),
    "deltas-graphs": partial(deltas, graphs=True),
}
