"""Warm-up: the first steps of an engine, before it is ready, so that a base that cannot run is refused at the start.

The steps leave nothing: their prompts fill no block of the prefix cache, and their programs are evicted.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltamux.deltas import (
    AttentionSite,
    BaseModel,
    BlockSite,
    Bottleneck,
    EmbeddingSite,
    ExpertsSite,
    KVPrefix,
    LinearSite,
    LowRank,
    LowRankExperts,
    NormAffine,
    NormSite,
    Op,
    Program,
    Site,
    SoftPrompt,
)
from deltamux.engine.base import ProgramRef, SamplingOptions
from deltamux.errors import DeltamuxError, FailedPreconditionError, UnavailableError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from deltamux.engine.vllm.frontend.engine import VLLMEngine

PROMPT = (0,)
SAMPLING = SamplingOptions(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=1)
"""With log-probabilities, whose first use compiles a kernel in the step: for two seconds on a CPU."""
LONGEST_SEQUENCE = 4
"""Tokens of the longest sequence of a warm-up: a virtual token, the prompt, and what is generated."""
PATIENCE = 600.0
"""Seconds for a step, which may compile kernels first."""


async def warm_up(engine: VLLMEngine, config: VllmConfig) -> None:
    """Runs the base alone, and then the base with deltas at every site that takes them.

    Raises:
        FailedPreconditionError: the base cannot run a step (BASE_CANNOT_RUN), or none with deltas
            (BASE_TAKES_NO_DELTAS).
    """
    if engine.max_model_len < LONGEST_SEQUENCE:
        return
    await _step(engine, config, (), "BASE_CANNOT_RUN", "cannot run a step")
    assert engine.support is not None
    if not engine.support.sites:
        return
    with tempfile.TemporaryDirectory(prefix="deltamux-warmup-") as directory:
        refs = [_saved(program, Path(directory)) for program in warmup_programs(engine.base, engine.support.sites)]
        await _step(engine, config, refs, "BASE_TAKES_NO_DELTAS", "runs, but cannot run a step with deltas")
        for ref in refs:
            await engine.evict(ref.digest)


async def _step(engine: VLLMEngine, config: VllmConfig, refs: Iterable[ProgramRef], reason: str, problem: str) -> None:
    """Generates with the base and with every program, in one batch."""
    try:
        async with asyncio.timeout(PATIENCE):
            jobs = [_generate(engine, ref) for ref in (None, *refs)]
            for failed in [e for e in await asyncio.gather(*jobs, return_exceptions=True) if e is not None]:
                raise failed
    except (DeltamuxError, TimeoutError) as error:
        cause = await engine.end_reason() or _cause(error)
        raise FailedPreconditionError(
            f"the base model {engine.base.name} ({engine.base.architecture}) {problem} here: {cause}{_known(config)}",
            reason=reason,
        ) from error


async def _generate(engine: VLLMEngine, ref: ProgramRef | None) -> None:
    request_id = f"warm-up-{ref.digest if ref else 'base'}"
    async for chunk in engine.generate(PROMPT, SAMPLING, ref, request_id=request_id, stream=False):
        if ref is None and any(math.isnan(position.logprob) for position in chunk.logprobs):
            raise FailedPreconditionError(
                "what it answers is not a number: weights in its files are NaN or infinite, or overflow in this dtype"
            )


def _cause(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"a step took more than {PATIENCE:g} s"
    if isinstance(error, UnavailableError):
        return "the engine's process ended without an error, as one does that crashes in native code or lacks memory"
    return str(error)


def _known(config: VllmConfig) -> str:
    """Returns a known obstacle of bases of this kind, as a sentence that follows the cause."""
    model = config.model_config
    if model.using_transformers_backend():
        return f". vLLM has no implementation of its own of {model.architecture}, and runs it as transformers has it"
    return ""


def warmup_programs(base: BaseModel, bound: Iterable[tuple[str, str]]) -> list[Program]:
    """Returns programs that together have an op at every site, except the output head, whose op is as large as it is.

    Args:
        bound: kinds and names of the sites that take ops.
    """
    sites = [site for (kind, name), site in base.sites.items() if (str(kind), name) in set(bound)]
    embeddings = [site for site in sites if isinstance(site, EmbeddingSite)]
    programs = (_ops(s for s in sites if s not in embeddings), _ops(embeddings))
    return [Program.of(placements) for placements in map(list, programs) if placements]


def _ops(sites: Iterable[Site]) -> Iterator[tuple[str, Op]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 0.01 * torch.randn(shape, generator=generator)

    for site in sites:
        if isinstance(site, LinearSite):
            yield site.name, LowRank(draw(1, site.in_features), draw(site.out_features, 1))
        elif isinstance(site, ExpertsSite):
            a, b = draw(site.num_experts, 1, site.in_features), draw(site.num_experts, site.out_features, 1)
            yield site.name, LowRankExperts(a, b)
        elif isinstance(site, BlockSite):
            yield site.name, Bottleneck(draw(1, site.features), draw(site.features, 1))
        elif isinstance(site, NormSite):
            yield site.name, NormAffine(draw(site.features))
        elif isinstance(site, AttentionSite):
            shape = (1, site.num_kv_heads, site.head_dim)
            yield site.name, KVPrefix(draw(*shape), draw(*shape))
        elif isinstance(site, EmbeddingSite) and site.takes_embeddings:
            yield site.name, SoftPrompt(draw(1, site.features))


def _saved(program: Program, directory: Path) -> ProgramRef:
    digest = f"warm-up-{program.placements[-1].op.name}"
    path = directory / f"{digest}.safetensors"
    program.save(path)
    return ProgramRef(digest, path, program.num_virtual_tokens)
