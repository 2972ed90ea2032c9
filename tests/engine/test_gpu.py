"""The real engine on a GPU: eagerly, and compiled with CUDA graphs. Skipped where there is none.

Slots are fewer than adapters, so that they change hands between the steps that replay one graph.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from deltamux.conformance.parity import TOLERANCE, Greedy, assert_same, served
from deltamux.engine.base import ProgramRef
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux_testing.engines import PROFILES, replayed, started
from deltamux_testing.mixed_batches import Request, requests, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SLOTS = 5


class Way(NamedTuple):
    """How an engine runs; what of it may differ from the reference executor in float32, in log-probability."""

    eager: bool
    dtype: str
    tolerance: float
    backend: str


WAYS = {
    "eager, float32": Way(True, "float32", TOLERANCE, "TRITON_ATTN"),
    "graphs, float32": Way(False, "float32", TOLERANCE, "TRITON_ATTN"),
    "graphs, bfloat16": Way(False, "bfloat16", 0.3, "FLASH_ATTN"),
}


@pytest.fixture(scope="module", params=WAYS)
async def on_gpu(
    request: pytest.FixtureRequest, base_directory: Path, real_engine: None
) -> AsyncIterator[tuple[Way, VLLMEngine]]:
    way = WAYS[request.param]
    arguments: dict[str, Any] = {
        "enforce_eager": way.eager,
        "attention_backend": way.backend,
        "kv_cache_memory_bytes": 1 << 28,
        "gpu_memory_utilization": 0.1,  # others may use the device as well
        "worker_cls": "deltamux_testing.workers.CountingWorker",
    }
    options = {"dtype": way.dtype, "device": "cuda", "max_active_adapters": SLOTS, "engine_arguments": arguments}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_F32_DEFAULT", "ieee")  # vLLM's attention multiplies float32 as TF32 otherwise
        async with started(base_directory, **options) as engine:
            yield way, engine


async def test_a_mixed_batch_is_what_the_reference_executor_computes(
    on_gpu: tuple[Way, VLLMEngine], programs: dict[str, ProgramRef], expected: dict[Request, Greedy]
) -> None:
    way, engine = on_gpu
    together = await asyncio.gather(*(run(engine, programs, request) for request in expected))
    for answer, mixed in zip(expected.values(), together, strict=True):
        assert_same(answer, mixed, way.tolerance)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=requests())
async def test_a_mixed_batch_gives_each_request_what_it_gets_alone(
    batch: list[Request], on_gpu: tuple[Way, VLLMEngine], programs: dict[str, ProgramRef]
) -> None:
    way, engine = on_gpu
    together = await asyncio.gather(*(run(engine, programs, request) for request in batch))
    for request, mixed in zip(batch, together, strict=True):
        assert_same(await run(engine, programs, request), mixed, way.tolerance)


async def test_a_step_replays_the_least_graph_that_serves_its_adapters(
    on_gpu: tuple[Way, VLLMEngine], programs: dict[str, ProgramRef]
) -> None:
    way, engine = on_gpu
    wanted: list[tuple[str | None, set[str]]] = [(None, {"BASE"}), *PROFILES.items()]
    for name, profiles in wanted:
        before = await replayed(engine)
        await served(engine, (9, 8, 7), programs[name] if name else None, 4, f"profile-{way}-{name}")
        after = await replayed(engine)
        new = {key for key, count in after.items() if count != before.get(key)}
        if way.eager:
            assert new == {"none"}, name
            continue
        assert {key.split()[-1] for key in new} == profiles, name
        # Prompts run by pieces, and what is generated after them by whole graphs.
        assert profiles == {"none"} or any(key.startswith("FULL") for key in new), name
