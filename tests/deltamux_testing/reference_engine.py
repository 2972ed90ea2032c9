"""An engine of a hundred lines: a Hugging Face model, the reference executor, one token a forward pass.

It serves the server's tests where vLLM would only add its start-up: everything around the engine is the real thing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.deltas import BaseModel, BaseSupport, Program, attached
from deltamux.engine.base import (
    EngineStats,
    GenerationChunk,
    ProgramRef,
    Prompt,
    SamplingOptions,
    TokenLogprobs,
)
from deltamux.engine.checks import check_prompt, check_sampling
from deltamux.engine.vllm.frontend.prompts import Prompts
from deltamux.errors import FailedPreconditionError, UnavailableError


class ReferenceEngine:
    """See `deltamux.engine.base.Engine`.

    Attributes:
        step_seconds: pause after every token, so that a test can act while a stream runs.
        running: ids of the requests under way.
        aborted: ids of the requests that were closed before their end.
        salts: cache salts of the requests, in their order.
    """

    def __init__(self, model: Path, *, step_seconds: float = 0.0) -> None:
        self.base = BaseModel.from_pretrained(model)
        self.step_seconds = step_seconds
        self.max_model_len = 0
        self.support: BaseSupport | None = None
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.salts: list[str] = []
        self.host: dict[str, Program] = {}
        self.pinned: set[str] = set()
        self._path = model
        self._alive = False
        self._hangs = False
        self._refuses = False
        self._lock = threading.Lock()

    async def start(self) -> None:
        if self._refuses:
            raise FailedPreconditionError("this engine does not start", reason="TESTED")
        model: Any = AutoModelForCausalLM.from_pretrained(self._path, dtype=torch.float32)
        self._model = model.eval()
        self.max_model_len = model.config.max_position_embeddings
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self._path)
        self._prompts = Prompts(self._tokenizer, self.max_model_len)
        taken = frozenset((str(kind), name) for kind, name in self.base.sites)
        self.support = BaseSupport(taken, dtype="float32", dtype_reason="the reference")
        self._alive = True

    async def stop(self) -> None:
        self._alive = False
        self._prompts.close()

    def crash(self) -> None:
        """From here on the engine is as dead as vLLM's after an exception in its worker."""
        self._alive = False

    def refuse_to_start(self) -> None:
        self._refuses = True

    def hang(self) -> None:
        """From here on the engine claims to be well and answers nothing."""
        self._hangs = True

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingOptions,
        program: ProgramRef | None,
        *,
        request_id: str,
        stream: bool = True,
        group: str = "",
        cache_salt: str = "",
    ) -> AsyncGenerator[GenerationChunk]:
        room = self.max_model_len - (program.num_virtual_tokens if program else 0)
        prompt_ids = await self._prompts.token_ids(prompt, room - 1, group)
        check_prompt(prompt_ids, self.base.dims.vocab_size, room - 1)
        check_sampling(sampling, self.base.dims.vocab_size, room - len(prompt_ids))
        if program:
            await self.prepare(program)
        delta = self.host[program.digest] if program else None
        self.running.add(request_id)
        self.salts.append(cache_salt)
        finished = False
        try:
            generator = torch.Generator().manual_seed(sampling.seed) if sampling.seed is not None else None
            new: list[int] = []
            text = ""
            while not finished:
                if not self._alive:
                    raise UnavailableError("the engine has stopped; the request may be sent again once it is back")
                logits = await asyncio.to_thread(self._logits, prompt_ids + new, delta)
                token = _sample(logits, sampling, generator)
                new.append(token)
                chunk, text = self._chunk(prompt_ids, new, text, logits, sampling)
                finished = chunk.finish_reason is not None
                yield chunk
                await asyncio.sleep(self.step_seconds)
        finally:
            self.running.discard(request_id)
            if not finished:
                self.aborted.append(request_id)

    async def prepare(self, program: ProgramRef) -> None:
        if program.digest not in self.host:
            self.host[program.digest] = await asyncio.to_thread(Program.load, program.path, program.sha256)

    async def check(self, program: ProgramRef) -> None:
        await asyncio.to_thread(Program.load, program.path)

    async def pin(self, program: ProgramRef) -> None:
        await self.prepare(program)
        self.pinned.add(program.digest)

    async def unpin(self, digest: str) -> None:
        self.pinned.discard(digest)

    async def evict(self, digest: str) -> None:
        self.host.pop(digest, None)

    async def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running), host_programs=len(self.host), device_programs=0, device_slots=0)

    async def ping(self) -> None:
        if self._hangs:
            await asyncio.Event().wait()

    @property
    def healthy(self) -> bool:
        return self._alive

    def _logits(self, ids: list[int], program: Program | None) -> torch.Tensor:
        with self._lock, torch.inference_mode():
            tokens = torch.tensor([ids])
            if program is None:
                return self._model(tokens).logits[0, -1]  # type: ignore[no-any-return]  # an untyped model
            with attached(self._model, self.base, program):
                return self._model(tokens).logits[0, -1]  # type: ignore[no-any-return]  # as above

    def _chunk(
        self, prompt: list[int], new: list[int], before: str, logits: torch.Tensor, sampling: SamplingOptions
    ) -> tuple[GenerationChunk, str]:
        text: str = self._tokenizer.decode(new, skip_special_tokens=sampling.skip_special_tokens)
        text = text if not text.endswith("\ufffd") else before
        ended = new[-1] == self._tokenizer.eos_token_id and not sampling.ignore_eos
        full = sampling.max_tokens is not None and len(new) >= sampling.max_tokens
        stop = next((s for s in sampling.stop if s in text), None)
        chunk = GenerationChunk(
            text=text[len(before) :],
            token_ids=(new[-1],),
            logprobs=_logprobs(logits, new[-1], sampling.logprobs),
            finish_reason="stop" if ended or stop else "length" if full else None,
            stop_reason=stop,
            prompt_tokens=len(prompt),
            cached_tokens=0,
        )
        return chunk, text


def _sample(logits: torch.Tensor, sampling: SamplingOptions, generator: torch.Generator | None) -> int:
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _logprobs(logits: torch.Tensor, token: int, count: int | None) -> tuple[TokenLogprobs, ...]:
    if count is None:
        return ()
    values = torch.log_softmax(logits, dim=-1)
    best = values.topk(count)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return (TokenLogprobs(float(values[token]), top),)
