"""`VLLMEngine`: vLLM's AsyncLLM with deltamux's worker, and the host cache that leases programs to requests."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from deltamux.deltas import BaseModel, BaseSupport
from deltamux.engine.arguments import in_a_sentence
from deltamux.engine.base import (
    EngineOptions,
    EngineStats,
    GenerationChunk,
    ProgramRef,
    Prompt,
    SamplingOptions,
)
from deltamux.engine.checks import check_prompt, check_sampling
from deltamux.engine.fair import FairOrder, Place
from deltamux.engine.vllm import fork_server
from deltamux.engine.vllm.frontend.config import device_of, engine_config
from deltamux.engine.vllm.frontend.dtype import choose
from deltamux.engine.vllm.frontend.host_cache import HostCache
from deltamux.engine.vllm.grammars.vocabulary import check_stop_tokens, special_tokens
from deltamux.engine.vllm.loading.client import LoaderClient
from deltamux.engine.vllm.processes import EngineProcesses, Launch, start_errors, starting
from deltamux.errors import DeltamuxError, FailedPreconditionError, UnavailableError
from deltamux.prompts import with_processor_template

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from deltamux.engine.vllm.frontend.prompts import Prompts
    from deltamux.engine.vllm.grammars.admission import Constraint, Grammars
T = TypeVar("T")
logger = logging.getLogger("deltamux.engine")

PLACEHOLDER = 0
"""Token id in place of virtual tokens; its keys and values, or its embedding, are replaced."""

CHECK_SECONDS = 0.2
"""Between checks of vLLM's health while it has not answered."""


class VLLMEngine:
    """The `deltamux.engine.base.Engine` on vLLM. One instance starts vLLM's processes once, for one base model.

    Args:
        base: the model's description, where an engine of the same options has read it before.
    """

    def __init__(self, options: EngineOptions, *, base: BaseModel | None = None) -> None:
        fork_server.start()
        self._options = options
        self.base = base or BaseModel.from_pretrained(options.model)
        self.max_model_len = 0
        self.support: BaseSupport | None = None
        self._llm: AsyncLLM | None = None
        self._loaders: LoaderClient | None = None
        self._launch: Launch | None = None
        self._processes: EngineProcesses | None = None
        # vLLM's processes end with the thread that has started them.
        self._thread = ThreadPoolExecutor(1, "deltamux-engine")
        self._prompts: Prompts | None = None
        self._grammars: Grammars | None = None
        self._special_tokens: frozenset[int] = frozenset()
        self._order = FairOrder()

    async def start(self) -> None:
        """Loads the base model; returns when the engine takes requests.

        Raises:
            FailedPreconditionError: it cannot be loaded, or cannot run (see `warmup`); its processes have ended.
        """
        with start_errors() as reported:
            try:
                await self._start()
            except BaseException as error:
                await self.stop()
                if isinstance(error, DeltamuxError) or not isinstance(error, Exception):
                    raise
                raise FailedPreconditionError(
                    f"vLLM did not start with the base model {self._options.model}: "
                    f"{reported() or in_a_sentence(error)}",
                    reason="ENGINE_START_FAILED",
                ) from error

    async def _start(self) -> None:
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from deltamux.engine.vllm.frontend import detokenizing, outputs
        from deltamux.engine.vllm.frontend.prompts import Prompts
        from deltamux.engine.vllm.frontend.warmup import warm_up
        from deltamux.engine.vllm.grammars.admission import Grammars

        detokenizing.install()
        dtype = await asyncio.to_thread(choose, self._options, self.base.num_parameters, device_of(self._options))
        config = await asyncio.to_thread(engine_config, replace(self._options, dtype=dtype.name))
        assert config.lora_config is not None
        self._num_slots = config.lora_config.max_loras

        def launch() -> AsyncLLM:
            with starting():
                return AsyncLLM.from_vllm_config(
                    config, usage_context=UsageContext.ENGINE_CONTEXT, disable_log_stats=True
                )

        self._launch = Launch(self._thread, launch)
        llm = await asyncio.wrap_future(self._launch.result)
        self._processes, self._llm = EngineProcesses(_core_pids(llm)), llm
        self._loaders = await LoaderClient.open(self.call_workers, os.sched_getaffinity(0))
        self._host = HostCache(self._loaders, self._options.max_host_adapters)
        self._writes_prefixes = all(await self.call_workers("delta_writes_prefixes"))
        self._pace = outputs.Pace.of(llm)
        self.max_model_len = llm.model_config.max_model_len
        used = str(llm.model_config.dtype).removeprefix("torch.")
        answers: list[Any] = await self.call_workers("delta_support")
        self.support = BaseSupport.of_workers(answers, dtype=used, dtype_reason=dtype.reason)
        tokenizer = await asyncio.to_thread(with_processor_template, llm.get_tokenizer(), str(self._options.model))
        self._prompts = await asyncio.to_thread(Prompts, tokenizer, self.max_model_len)
        self._grammars = await asyncio.to_thread(Grammars.of, config, tokenizer, self._options.grammar_seconds)
        self._special_tokens = special_tokens(tokenizer)
        began = time.perf_counter()
        await warm_up(self, config)
        logger.info("warm-up took %.2f s", time.perf_counter() - began)
        if self._options.warm_grammars and self._grammars is not None:
            self._grammars.warm()

    async def stop(self) -> None:
        """Ends vLLM's processes and waits until they are gone; requests under way end with UNAVAILABLE."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._launch is not None:
            await asyncio.to_thread(self._launch.break_off)
        if self._llm is not None:
            llm, self._llm = self._llm, None
            # The handler would report the end of the engine's process as a failure; here it is wanted.
            if llm.output_handler is not None:
                llm.output_handler.cancel()
            llm.output_processor.propagate_error(EngineDeadError())
            if self._prompts is not None:
                self._prompts.close()
            if self._grammars is not None:
                await self._grammars.close()
            if self._loaders is not None:
                await self._loaders.close()
            assert self._processes is not None, "they are known since vLLM has started"
            if left := await asyncio.to_thread(self._processes.stop, llm.shutdown):
                logger.error("processes of the engine cannot be ended: %s", left)
        self._thread.shutdown(wait=False)

    @property
    def healthy(self) -> bool:
        return self._llm is not None and not self._llm.errored

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
        """Yields what is generated as it comes; closing the iterator aborts the request in the engine."""
        if program is not None:
            self._host.prefetch(program)
        token_ids = await self._checked_prompt(prompt, sampling, program.num_virtual_tokens if program else 0, group)
        constraint = None
        if sampling.structured_output is not None and self._grammars is not None:
            check_stop_tokens(sampling.stop_token_ids, self._special_tokens)
            constraint = await self._grammars.admit(sampling.structured_output, group)
        async with AsyncExitStack() as stack:
            program_id = await stack.enter_async_context(self._host.lease(program)) if program else 0
            # Closed here and not when it is collected: the abort must reach vLLM before the lease ends.
            place = stack.enter_context(self._order.place(group))
            outputs = self._run(
                *(token_ids, sampling, constraint, program, program_id, request_id, place),
                stream=stream,
                cache_salt=cache_salt,
            )
            async for output in await stack.enter_async_context(aclosing(outputs)):
                place.begin()
                yield output

    async def prepare(self, program: ProgramRef) -> None:
        """Loads a program into host memory, so that its first request finds it there."""
        async with self._host.lease(program):
            pass

    async def check(self, program: ProgramRef) -> None:
        await self._host.check(program)

    async def pin(self, program: ProgramRef) -> None:
        await self._host.pin(program)

    async def unpin(self, digest: str) -> None:
        await self._host.unpin(digest)

    async def evict(self, digest: str) -> None:
        await self._host.evict(digest)

    async def stats(self) -> EngineStats:
        resident = (await self.call_workers("delta_resident"))[0]
        assert isinstance(resident, dict)
        return EngineStats(
            running=self._engine.output_processor.get_num_unfinished_requests(),  # type: ignore[no-untyped-call]  # vLLM
            host_programs=len(resident["host"]),
            device_programs=len(resident["device"]),
            device_slots=self._num_slots,
            merged_program=self._host.digest_of(resident["merged"][0]) if resident["merged"] else None,
        )

    async def ping(self) -> None:
        """Calls the engine core, which answers between steps: one that waits for a hung worker does not.

        A call of the worker would keep it polling for the next one, at full speed, for a second.
        """
        await self._while_alive(self._engine.is_sleeping())

    async def end_reason(self) -> str:
        """Returns what ended an engine that has died, as its worker sent it; "" if it did not."""
        return await self._loaders.end_reason() if self._loaders is not None and not self.healthy else ""

    async def device_programs(self) -> list[int]:
        """Returns the workers' ids of the programs in device slots, the last to come there last."""
        resident = (await self.call_workers("delta_resident"))[0]
        assert isinstance(resident, dict)
        programs: list[int] = resident["device"]
        return programs

    async def _run(
        self,
        token_ids: list[int],
        sampling: SamplingOptions,
        constraint: Constraint | None,
        program: ProgramRef | None,
        program_id: int,
        request_id: str,
        place: Place,
        *,
        stream: bool,
        cache_salt: str,
    ) -> AsyncGenerator[GenerationChunk]:
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest

        from deltamux.engine.vllm.frontend.outputs import PacedCollector, outputs_of
        from deltamux.engine.vllm.frontend.translate import callers_mistakes, chunk, engine_faults, sampling_params
        from deltamux.engine.vllm.prefixes import EXTRA_ARG, known_tokens

        virtual = program.num_virtual_tokens if program else 0
        # A repetition penalty counts the prompt's tokens: then the placeholder is one that the prompt has anyway.
        placeholder = token_ids[0] if sampling.repetition_penalty != 1.0 else PLACEHOLDER
        prompt = TokensPrompt(prompt_token_ids=[placeholder] * virtual + token_ids)
        if cache_salt:
            prompt["cache_salt"] = cache_salt
        request = LoRARequest(program.digest, program_id, str(program.path)) if program else None
        with engine_faults():
            with callers_mistakes():
                parameters = sampling_params(sampling, constraint, stream=stream)
            if virtual and self._writes_prefixes and program is not None:
                parameters.extra_args = {EXTRA_ARG: await asyncio.to_thread(known_tokens, program, self.base)}
            with callers_mistakes():
                collector = await self._engine.add_request(
                    request_id, prompt, parameters, lora_request=request, priority=place.number
                )
            async with aclosing(outputs_of(self._engine, PacedCollector.adopt(collector, self._pace))) as outputs:
                async for output in outputs:
                    yield chunk(output, len(token_ids), virtual)

    async def _checked_prompt(
        self, prompt: Prompt, sampling: SamplingOptions, num_virtual_tokens: int, group: str
    ) -> list[int]:
        room, vocab_size = self.max_model_len - num_virtual_tokens, self.base.dims.vocab_size
        assert self._prompts is not None
        token_ids = await self._prompts.token_ids(prompt, room - 1, group)
        check_prompt(token_ids, vocab_size, room - 1)
        check_sampling(sampling, vocab_size, room - len(token_ids))
        return token_ids

    @property
    def _engine(self) -> AsyncLLM:
        if self._llm is None:
            raise UnavailableError("the engine is not running")
        return self._llm

    async def call_workers(self, method: str, args: tuple[object, ...] = ()) -> list[object]:
        """Calls a method of every worker, between two steps."""
        answers: list[object] = await self._while_alive(self._engine.collective_rpc(method, args=args))
        return answers

    async def _while_alive(self, answer: Coroutine[Any, Any, T]) -> T:
        """Returns vLLM's answer; raises UnavailableError if it dies before, since then there never is one."""
        from vllm.v1.engine.exceptions import EngineDeadError

        from deltamux.engine.vllm.frontend.translate import engine_faults

        pending = asyncio.ensure_future(answer)
        try:
            with engine_faults():
                while not (await asyncio.wait([pending], timeout=CHECK_SECONDS))[0]:
                    if not self.healthy:
                        raise EngineDeadError
                return pending.result()
        finally:
            pending.cancel()


def _core_pids(llm: AsyncLLM) -> list[int]:
    """Returns the ids of the processes that this one has started for an engine; none where Ray has started them."""
    manager = getattr(llm.engine_core, "resources").engine_manager  # noqa: B009 - vLLM declares it of one subclass
    return [process.pid for process in getattr(manager, "processes", []) if process.pid is not None]
