"""What deltamux is held against: vLLM as it is, vLLM's own LoRA, and PEFT's mixed batches."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from deltamux.bench import Measurement, Request, Workload

_numbers = itertools.count()


class VLLM:
    """vLLM's AsyncLLM without deltamux, and with vLLM's own defaults: its runner, its compilation, its scheduler.

    Args:
        arguments: of AsyncEngineArgs.
        loras: directories of LoRA adapters by name, for vLLM's multi-LoRA.
    """

    def __init__(self, arguments: Mapping[str, Any], loras: Mapping[str, Path], vocab_size: int) -> None:
        self._arguments = dict(arguments)
        self._loras = {name: (number, path) for number, (name, path) in enumerate(loras.items(), start=1)}
        self.vocab_size = vocab_size
        self._llm: Any = None

    async def start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        with _untouched_environment():
            self._llm = await asyncio.to_thread(AsyncLLM.from_engine_args, AsyncEngineArgs(**self._arguments))

    async def stop(self) -> None:
        llm, self._llm = self._llm, None
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # it would report the end of the engine's process as a failure
        await asyncio.to_thread(llm.shutdown)

    async def call_workers(self, method: str, args: tuple[object, ...] = ()) -> list[Any]:
        """Calls a method of every worker, between two steps."""
        answers: list[Any] = await self._llm.collective_rpc(method, args=args)
        return answers

    async def stream(self, request: Request) -> AsyncGenerator[int]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA
        sampling = SamplingParams(max_tokens=request.new_tokens, temperature=0.0, ignore_eos=True, output_kind=kind)
        lora = None
        if request.adapter is not None:
            number, path = self._loras[request.adapter]
            lora = LoRARequest(request.adapter, number, str(path))
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt))
        chunks = self._llm.generate(prompt, sampling, f"peer-{next(_numbers)}", lora_request=lora)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield len(chunk.outputs[0].token_ids)


@contextmanager
def _untouched_environment() -> Iterator[None]:
    """Restores vLLM's environment variables that our engine sets, but for those of logging, while a peer starts."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    ours = os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    try:
        yield
    finally:
        if ours is not None:
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = ours


class PEFT:
    """PEFT's mixed batches: one `generate` of transformers with `adapter_names`, a name a sequence.

    It streams nothing, so that its measurements hold no times but the whole.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size

    @classmethod
    def load(cls, model: Path, loras: Mapping[str, Path], vocab_size: int) -> Self:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        (first, directory), *others = loras.items()
        adapted: Any = PeftModel.from_pretrained(base, str(directory), adapter_name=first)
        for name, path in others:
            adapted.load_adapter(str(path), adapter_name=name)
        adapted.to(torch.bfloat16).eval()
        gc.freeze()  # its many modules would make this process's collections, and so the other side, slower
        return cls(adapted, vocab_size)

    async def run(self, workload: Workload, threads: int, seed: str) -> Measurement:
        """Runs a workload whose sequences all fit into one batch, with so many of torch's threads."""
        requests = workload.traffic(seed, self._vocab_size)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            # Off the event loop no less than a server's own work would be: the engines are idle meanwhile.
            return self._generate(requests, workload.new_tokens)
        finally:
            torch.set_num_threads(before)

    @torch.inference_mode()
    def _generate(self, requests: list[Request], new_tokens: int) -> Measurement:
        prompts = torch.tensor([request.prompt for request in requests])
        names = [request.adapter or "__base__" for request in requests]
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        started = time.perf_counter()
        output = self._model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            adapter_names=names,
            do_sample=False,
            pad_token_id=0,
            **length,
        )
        seconds = time.perf_counter() - started
        return Measurement(seconds, output[:, prompts.shape[1] :].numel())
