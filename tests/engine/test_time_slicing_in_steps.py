"""More adapters than slots: they share time slices, and loads and failures of one adapter affect no other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from deltamux.conformance.parity import served
from deltamux.deltas import BaseModel
from deltamux.engine.base import ProgramRef, SamplingOptions
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.engine.vllm.loading.client import LoaderClient
from deltamux.errors import FailedPreconditionError
from deltamux_testing import random_programs
from deltamux_testing.engines import assert_all_same, settled, started
from deltamux_testing.mixed_batches import Request, requests, run, serial

NAMES = ("low-rank", "low-rank-other", "bottleneck", "prefix", "soft-prompt", "everything")


@pytest.fixture(scope="module")
async def narrow(base_directory: Path, real_engine: None) -> AsyncIterator[VLLMEngine]:
    """An engine of two slots whose cache holds too little for all of its requests, so that some are preempted."""
    arguments = {"max_num_batched_tokens": 24, "block_size": 32, "num_gpu_blocks_override": 16}
    slots = {"max_active_adapters": 2, "max_host_adapters": 4}
    async with started(base_directory, enforce_eager=True, engine_arguments=arguments, **slots) as engine:
        yield engine


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(batch=requests(NAMES, most=14, most_tokens=30))
async def test_time_slicing_changes_no_request(
    batch: list[Request], narrow: VLLMEngine, programs: dict[str, ProgramRef]
) -> None:
    alone = [await run(narrow, programs, request) for request in batch]
    together = await asyncio.gather(*(run(narrow, programs, request) for request in batch))
    assert_all_same(alone, together)


async def test_every_adapter_has_its_first_token_before_any_generation_ends(
    narrow: VLLMEngine, programs: dict[str, ProgramRef]
) -> None:
    sampling = SamplingOptions(max_tokens=40, temperature=0.0, ignore_eos=True)
    for name in NAMES:
        await narrow.prepare(programs[name])
    events: list[str] = []

    async def stream(name: str) -> None:
        chunks = narrow.generate((5, 6, 7), sampling, programs[name], request_id=f"first-{next(serial)}")
        first = True
        async for _ in chunks:
            if first:
                events.append("first")
            first = False
        events.append("end")

    await asyncio.gather(*(stream(name) for name in NAMES))
    assert events == ["first"] * len(NAMES) + ["end"] * len(NAMES)


class SlowFile:
    """A program's file that gives nothing until `end`: then it holds what is given."""

    def __init__(self, path: Path) -> None:
        self.ref = ProgramRef(path.stem, path)
        self._pipe = path.with_suffix(".pipe")
        os.mkfifo(self._pipe)
        path.hardlink_to(self._pipe)

    def end(self, content: bytes = b"") -> None:
        self.ref.path.unlink()
        self.ref.path.write_bytes(content)
        # Whoever waits at the pipe reads it there, as far as a pipe holds it, and then finds the file.
        writer = os.open(self._pipe, os.O_RDWR | os.O_NONBLOCK)
        assert not content or os.write(writer, content) == len(content)
        os.close(writer)


async def emptied(engine: VLLMEngine, programs: dict[str, ProgramRef]) -> None:
    for ref in programs.values():
        await engine.evict(ref.digest)
    await settled(engine, programs=0)


async def test_a_load_that_hangs_holds_up_no_other_adapter_and_fails_only_its_own_requests(
    narrow: VLLMEngine, programs: dict[str, ProgramRef], tmp_path: Path
) -> None:
    await emptied(narrow, programs)
    slow = SlowFile(tmp_path / "hangs.safetensors")
    doomed = [asyncio.create_task(served(narrow, (5, 6), slow.ref, 4, f"doomed-{i}")) for i in range(3)]
    await settled(narrow, programs=1)
    cold = [served(narrow, (5, 6, 7), programs[name], 4, f"cold-{next(serial)}") for name in NAMES[:2]]
    assert [len(answer.token_ids) for answer in await asyncio.gather(*cold)] == [4, 4]
    slow.end()
    for outcome in await asyncio.gather(*doomed, return_exceptions=True):
        assert isinstance(outcome, FailedPreconditionError)
        assert outcome.reason == "PROGRAM_REFUSED"
    await settled(narrow, programs=2)


@pytest.mark.parametrize("ends", ["well", "badly"])
async def test_a_request_cancelled_while_its_adapter_loads_leaves_nothing_behind(
    ends: str, narrow: VLLMEngine, base: BaseModel, programs: dict[str, ProgramRef], tmp_path: Path
) -> None:
    await emptied(narrow, programs)
    good = random_programs.saved(random_programs.low_rank(base, 900), tmp_path, "good").path.read_bytes()
    slow = SlowFile(tmp_path / f"cancelled-{ends}.safetensors")
    waiting = asyncio.create_task(served(narrow, (5, 6), slow.ref, 4, f"cancelled-{next(serial)}"))
    await settled(narrow, programs=1)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    slow.end(good if ends == "well" else b"")
    if ends == "badly":
        await settled(narrow, programs=0)
        slow.ref.path.write_bytes(good)
    assert len((await served(narrow, (5, 6), slow.ref, 4, f"anew-{next(serial)}")).token_ids) == 4
    await narrow.evict(slow.ref.digest)
    await settled(narrow, programs=0)


async def test_workers_without_a_socket_are_reached_between_steps(
    narrow: VLLMEngine, programs: dict[str, ProgramRef], tmp_path: Path
) -> None:
    await emptied(narrow, programs)
    link = LoaderClient(narrow.call_workers, [])
    assert await link.load(1_000_001, programs["bottleneck"].path) > 0
    with pytest.raises(FailedPreconditionError):
        await link.load(1_000_002, tmp_path / "missing.safetensors")
    await link.drop(1_000_001)
    await link.drop(1_000_002)
    await settled(narrow, programs=0)


async def test_requests_over_many_more_adapters_than_host_memory_keeps_are_all_served(
    narrow: VLLMEngine, base: BaseModel, tmp_path: Path
) -> None:
    refs = [random_programs.saved(random_programs.low_rank(base, 1000 + i), tmp_path, f"many-{i}") for i in range(24)]
    alone = [await served(narrow, (5, 6, i + 3), ref, 6, f"alone-{i}") for i, ref in enumerate(refs)]
    order = [i for i in range(24) for _ in range(3)]
    jobs = (served(narrow, (5, 6, i + 3), refs[i], 6, f"many-{next(serial)}") for i in order)
    assert_all_same([alone[i] for i in order], await asyncio.gather(*jobs))
    assert (await narrow.stats()).host_programs <= 4
