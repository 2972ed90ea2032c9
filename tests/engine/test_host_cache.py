"""Programs come and go while requests run: host tier, device slots, refusals, cancellation."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from deltamux.conformance.parity import assert_same, served
from deltamux.deltas import BaseModel
from deltamux.engine.base import Engine, GenerationChunk, ProgramRef, SamplingOptions
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from deltamux_testing import random_programs
from deltamux_testing.disks import flip
from deltamux_testing.engines import assert_all_same, settled

GREEDY = SamplingOptions(max_tokens=200, temperature=0.0, ignore_eos=True)


async def test_more_adapters_than_slots_and_host_places_are_all_served(
    engine: Engine, base: BaseModel, tmp_path: Path
) -> None:
    refs = [random_programs.saved(random_programs.low_rank(base, 100 + i), tmp_path, f"many-{i}") for i in range(20)]
    alone = [await served(engine, (5, 6, i + 3), ref, 6, f"alone-{i}") for i, ref in enumerate(refs)]
    assert len({tuple(a.token_ids) for a in alone}) > 10, "different adapters must answer differently"
    jobs = (served(engine, (5, 6, i + 3), ref, 6, f"many-{i}") for i, ref in enumerate(refs))
    assert_all_same(alone, await asyncio.gather(*jobs))
    stats = await settled(engine)
    assert stats.host_programs <= 6
    assert stats.device_programs <= stats.device_slots


async def test_a_cached_program_needs_its_file_no_more(engine: Engine, base: BaseModel, tmp_path: Path) -> None:
    ref = random_programs.saved(random_programs.low_rank(base, 200), tmp_path, "file-gone")
    before = await served(engine, (9, 9, 4), ref, 6, "file-there")
    ref.path.unlink()
    assert_same(before, await served(engine, (9, 9, 4), ref, 6, "file-gone"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "not finite", "another base", "no program"])
async def test_a_program_that_cannot_be_used_is_refused_and_the_engine_serves_on(
    damage: str, engine: Engine, base: BaseModel, base_directory: Path, tmp_path: Path
) -> None:
    good = random_programs.low_rank(base, 300)
    name = f"bad-{damage.replace(' ', '-')}"
    if damage == "not finite":
        ref = random_programs.saved(random_programs.with_nan(good), tmp_path, name)
    elif damage == "another base":
        ref = random_programs.saved(random_programs.for_another_base(base), tmp_path, name)
    elif damage == "no program":
        ref = ProgramRef(name, tmp_path / "model.safetensors")
        shutil.copy(base_directory / "model.safetensors", ref.path)
    else:
        ref = random_programs.saved(good, tmp_path, name)
        data = ref.path.read_bytes()
        ref.path.unlink() if damage == "missing" else ref.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FailedPreconditionError) as refused:
        await engine.prepare(ref)
    assert refused.value.reason == "PROGRAM_REFUSED"
    assert engine.healthy
    assert len((await served(engine, (5, 6, 7), None, 4, f"after-{name}")).token_ids) == 4


async def test_a_repaired_program_is_loaded_anew(engine: Engine, base: BaseModel, tmp_path: Path) -> None:
    program = random_programs.low_rank(base, 400)
    missing = ProgramRef("repaired", tmp_path / "repaired.safetensors")
    with pytest.raises(FailedPreconditionError):
        await engine.prepare(missing)
    await engine.prepare(random_programs.saved(program, tmp_path, "repaired"))


@pytest.mark.parametrize("harm", ["one bit flipped", "missing"])
async def test_errors_of_a_damaged_program_and_of_one_that_does_not_fit_differ(
    harm: str, engine: Engine, base: BaseModel, tmp_path: Path
) -> None:
    path = random_programs.saved(random_programs.low_rank(base, 401), tmp_path, "stored").path
    whole = path.read_bytes()
    ref = ProgramRef(f"stored-{harm[:3]}", path, sha256=hashlib.sha256(whole).hexdigest())
    flip(path) if harm == "one bit flipped" else path.unlink()
    for _ in range(2):
        with pytest.raises(DataLossError) as lost:
            await engine.prepare(ref)
        assert (lost.value.reason, lost.value.metadata) == ("PROGRAM_DAMAGED", {"digest": ref.digest})
    path.write_bytes(whole)
    await engine.prepare(ref)
    assert engine.healthy


async def test_closing_the_iterator_aborts_the_generation(engine: Engine, programs: dict[str, ProgramRef]) -> None:
    stream: AsyncIterator[GenerationChunk] = engine.generate(
        (5, 6, 7), GREEDY, programs["prefix"], request_id="to-be-closed"
    )
    async with aclosing(stream) as chunks:  # type: ignore[type-var]  # an async generator behind the protocol
        async for _ in chunks:
            break
    await settled(engine)


async def test_eviction_waits_for_the_last_request(engine: Engine, base: BaseModel, tmp_path: Path) -> None:
    ref = random_programs.saved(random_programs.bottleneck(base, 500), tmp_path, "evicted")
    before = await served(engine, (3, 4, 5), ref, 60, "before-eviction")
    running = asyncio.create_task(served(engine, (3, 4, 5), ref, 60, "during-eviction"))
    await settled(engine, running=1)
    await engine.evict(ref.digest)
    assert_same(before, await running)
    ref.path.unlink()
    with pytest.raises(FailedPreconditionError):
        await engine.prepare(ref)


async def test_a_pinned_program_stays_when_others_fill_the_host_cache(
    engine: Engine, base: BaseModel, tmp_path: Path
) -> None:
    pinned = random_programs.saved(random_programs.low_rank(base, 600), tmp_path, "pinned")
    await engine.prepare(pinned)
    await engine.pin(pinned)
    pinned.path.unlink()
    for i in range(8):
        await engine.prepare(random_programs.saved(random_programs.low_rank(base, 601 + i), tmp_path, f"crowd-{i}"))
    await engine.prepare(pinned)
    await engine.unpin(pinned.digest)


async def test_a_pinned_program_keeps_its_slot_when_others_need_one(
    engine: VLLMEngine, base: BaseModel, tmp_path: Path
) -> None:
    pinned = random_programs.saved(random_programs.low_rank(base, 700), tmp_path, "pinned-slot")
    await served(engine, (5, 6, 7), pinned, 2, "pinned-slot")
    await engine.pin(pinned)
    slot = (await engine.device_programs())[-1]
    for i in range(8):
        other = random_programs.saved(random_programs.low_rank(base, 701 + i), tmp_path, f"slot-{i}")
        await served(engine, (5, 6, 7), other, 2, f"slot-{i}")
    assert slot in await engine.device_programs()
    await engine.unpin(pinned.digest)


@pytest.mark.parametrize(
    ("prompt", "reason"), [((), "EMPTY_PROMPT"), ((5, 256), "INVALID_TOKEN"), ((5,) * 256, "PROMPT_TOO_LONG")]
)
async def test_a_prompt_that_cannot_be_served_is_refused_before_the_engine(
    prompt: tuple[int, ...], reason: str, engine: Engine
) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        await served(engine, prompt, None, 4, f"refused-{reason}")
    assert refused.value.reason == reason
