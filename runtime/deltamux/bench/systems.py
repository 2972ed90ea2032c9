"""Systems under test: an engine in this process, and a server over gRPC."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deltamux.bench.traffic import Request

if TYPE_CHECKING:
    from deltamux.client import AsyncClient
    from deltamux.engine.base import Engine, ProgramRef

_numbers = itertools.count()
"""Of request ids, which must be new to an engine."""


@dataclass(frozen=True)
class EngineSystem:
    """An engine that runs in this process; `programs` are its adapters by name."""

    engine: Engine
    programs: Mapping[str, ProgramRef] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.engine.base.dims.vocab_size

    async def stream(self, request: Request) -> AsyncGenerator[int]:
        from deltamux.engine.base import SamplingOptions

        sampling = SamplingOptions(max_tokens=request.new_tokens, temperature=0.0, ignore_eos=True)
        program = self.programs[request.adapter] if request.adapter is not None else None
        chunks = self.engine.generate(request.prompt, sampling, program, request_id=f"bench-{next(_numbers)}")
        async with aclosing(chunks):
            async for chunk in chunks:
                yield len(chunk.token_ids)


@dataclass(frozen=True)
class ClientSystem:
    """A server over gRPC; adapters are named by their resource names.

    Attributes:
        vocab_size: the API has none; every model has a few hundred tokens.
    """

    client: AsyncClient
    vocab_size: int = 256

    async def stream(self, request: Request) -> AsyncGenerator[int]:
        chunks = self.client.generate_stream(
            request.prompt, adapter=request.adapter, max_tokens=request.new_tokens, temperature=0.0, ignore_eos=True
        )
        async for chunk in chunks:
            yield len(chunk.token_ids)
