"""The check with an engine: what it serves, in one batch with others, is what was trained."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from deltamux.conformance.cases import PROMPT, Case, Refused, base_directory, cases, loaded
from deltamux.conformance.parity import Greedy, assert_same, reference, served
from deltamux.deltas import Program, attached
from deltamux.engine.base import Engine, EngineOptions, ProgramRef
from deltamux.errors import DeltamuxError

NUM_TOKENS = 16
OTHERS = ("lora", "houlsby", "prefix")
"""Methods that share the batch with the one that is checked."""


def check_serving(own: Sequence[Case], architecture: str = "llama") -> None:
    """Starts an engine on a small base and serves every case of that architecture with others and the base.

    Raises:
        Refused: an answer is not that of the reference executor, alone or in the batch.
    """
    asyncio.run(_check(own, architecture))


async def _check(own: Sequence[Case], architecture: str) -> None:
    mine = [case for case in own if case.architecture == architecture]
    others = [case for case in cases(*OTHERS, architectures=[architecture]) if case not in mine]
    programs = {case.method.name: case.program(case.checkpoint()) for case in (*mine, *others)}
    with tempfile.TemporaryDirectory() as scratch:
        refs = {name: _saved(program, Path(scratch), name) for name, program in programs.items()}
        engine = _engine(base_directory(architecture), programs)
        try:
            await engine.start()
            names = [None, *refs]
            together = await asyncio.gather(*(_served(engine, refs, name, "together") for name in names))
            alone = [await _served(engine, refs, name, "alone") for name in names]
        except DeltamuxError as error:
            raise Refused(f"the engine cannot serve it: {error.message}") from error
        finally:
            await engine.stop()
    _compare(mine, programs, dict(zip(names, together, strict=True)), dict(zip(names, alone, strict=True)))


def _compare(
    own: Sequence[Case],
    programs: dict[str, Program],
    together: dict[str | None, Greedy],
    alone: dict[str | None, Greedy],
) -> None:
    for name in alone:
        _same(alone[name], together[name], f"{name or 'the base'} answers otherwise in a batch than alone")
    for case in own:
        model = loaded(case.directory)
        with torch.no_grad(), attached(model, case.base, programs[case.method.name]):
            expected = reference(model, PROMPT, NUM_TOKENS)
        _same(expected, together[case.method.name], f"{case.method.name} is not served as it was trained")


def _same(expected: Greedy, actual: Greedy, problem: str) -> None:
    try:
        assert_same(expected, actual)
    except AssertionError as error:
        raise Refused(f"{problem}: {error}") from error


async def _served(engine: Engine, refs: dict[str, ProgramRef], name: str | None, when: str) -> Greedy:
    return await served(engine, PROMPT, refs[name] if name else None, NUM_TOKENS, f"{name}-{when}")


def _saved(program: Program, directory: Path, name: str) -> ProgramRef:
    path = directory / f"{name}.safetensors"
    with torch.no_grad():
        program.save(path)
    return ProgramRef(name, path, program.num_virtual_tokens)


def _engine(directory: Path, programs: dict[str, Program]) -> Engine:
    from deltamux.engine.vllm.frontend.engine import VLLMEngine

    return VLLMEngine(
        EngineOptions(
            str(directory),
            dtype="float32",
            max_model_len=128,
            max_num_seqs=32,
            max_active_adapters=min(8, len(programs)),
            max_host_adapters=len(programs) + 8,
            kv_cache_gib=0.25,
            enforce_eager=True,
        )
    )
