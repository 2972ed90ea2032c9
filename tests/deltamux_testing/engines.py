"""Engines of vLLM that tests start, and what they see of one that runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from deltamux.conformance.parity import Greedy, assert_same
from deltamux.engine.base import Engine, EngineOptions, EngineStats
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.engine.vllm.frontend.outputs import Pace

OPTIONS = {"dtype": "float32", "max_model_len": 256, "kv_cache_gib": 0.25, "max_num_seqs": 16}
PROFILES = {
    "low-rank": {"LINEAR"},
    "bias": {"LINEAR"},
    "scale": {"ALL"},  # scales an input as well
    "bottleneck": {"ALL"},
    "prefix": {"BASE"},  # its keys and values are in the cache before the first step
    "soft-prompt": {"none", "BASE"},  # nothing to do once its virtual tokens are in the cache
    "everything": {"none"},  # three bottlenecks at one place have no kernels
}
"""The graphs that the steps of a request need, by its adapter."""


@asynccontextmanager
async def started(base_directory: Path, **options: Any) -> AsyncIterator[VLLMEngine]:
    """Runs an engine with the common options, and with those that are given."""
    engine = VLLMEngine(EngineOptions(str(base_directory), **{**OPTIONS, **options}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def assert_all_same(expected: Iterable[Greedy], actual: Iterable[Greedy]) -> None:
    for one, other in zip(expected, actual, strict=True):
        assert_same(one, other)


async def settled(engine: Engine, *, running: int = 0, programs: int | None = None) -> EngineStats:
    """Waits until an engine has so many requests, and its host memory so many programs, for at most ten seconds."""
    for _ in range(500):
        stats = await engine.stats()
        if stats.running == running and programs in (None, stats.host_programs):
            return stats
        await asyncio.sleep(0.02)
    raise AssertionError(f"not {running} requests and {programs} programs after ten seconds, but {stats}")


async def replayed(engine: VLLMEngine) -> dict[str, int]:
    """Returns how many steps the counting workers have run by each graph."""
    (counts,) = await engine.call_workers("replayed")
    assert isinstance(counts, dict)
    return counts


class NeverDue(Pace):
    """So busy a machine that only what cannot wait is handed over."""

    def __init__(self) -> None:
        super().__init__(lambda: 1, 1)

    def interval(self) -> float:
        return 3600.0
