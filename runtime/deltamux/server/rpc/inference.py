"""The Inference service: admit a request, resolve its adapter to a version, run it, emit responses."""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from deltamux.engine.base import Engine
from deltamux.errors import UnavailableError
from deltamux.server.access.caller import Caller, current_caller
from deltamux.server.access.concurrency import ConcurrencyLimit
from deltamux.server.compiling.fitting import Fitting
from deltamux.server.routing import Router
from deltamux.server.rpc.generation import Responses, add_increment, prompt_of, sampling_of
from deltamux.server.rpc.messages import base_message
from deltamux.server.transport.interceptors import Context
from deltamux.v1 import inference_pb2 as pb
from deltamux.v1 import inference_pb2_grpc as pb_grpc

SMALL_GRAMMAR_BYTES = 1 << 14
"""Largest grammar that is checked on the event loop (3 ms at most); larger ones are checked in a thread."""


class InferenceService(pb_grpc.InferenceServicer):
    """The service of inference.proto."""

    def __init__(
        self,
        engine: Engine,
        router: Router,
        limit: ConcurrencyLimit,
        fitting: Fitting,
        *,
        share_prefix_cache: bool = False,
    ) -> None:
        self._engine = engine
        self._fitting = fitting
        self._router = router
        self._limit = limit
        self._share_prefix_cache = share_prefix_cache

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        whole = pb.GenerateResponse()
        async with aclosing(self._run(request, stream=False)) as responses:
            async for response in responses:
                add_increment(whole, response)
        return whole

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse]:
        async with aclosing(self._run(request, stream=True)) as responses:
            async for response in responses:
                yield response

    async def GetBase(self, request: pb.GetBaseRequest, context: Context) -> pb.Base:
        support = self._engine.support
        if support is None:
            raise UnavailableError("the engine has not started yet", retry_after=1.0)
        methods = await self._fitting.refusals(support)
        return base_message(self._engine.base, self._engine.max_model_len, support, methods)

    async def _run(self, request: pb.GenerateRequest, *, stream: bool) -> AsyncGenerator[pb.GenerateResponse]:
        """The life of a request; its version is fixed here, whatever is promoted or deleted meanwhile."""
        prompt = prompt_of(request, self._engine.max_model_len)
        if request.sampling.structured_output.ByteSize() > SMALL_GRAMMAR_BYTES:
            sampling = await asyncio.to_thread(sampling_of, request.sampling)
        else:
            sampling = sampling_of(request.sampling)
        request_id = secrets.token_hex(8)
        tenant = self._router.tenant_of(request.adapter)
        async with self._limit.acquire(tenant), self._router.lease(request.adapter, request_id) as target:
            responses = Responses(bool(sampling.logprobs), adapter_version=target.name, request_id=request_id)
            chunks = self._engine.generate(
                prompt,
                sampling,
                target.program,
                request_id=request_id,
                stream=stream,
                group=tenant,
                cache_salt="" if self._share_prefix_cache else cache_salt(current_caller()),
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield responses.of(chunk)


def cache_salt(caller: Caller) -> str:
    """Returns vLLM's cache salt of a caller: one per tenant, and one for all administrators."""
    return f"tenants/{caller.tenant}" if caller.tenant else "administrators"
