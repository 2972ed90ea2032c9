"""`deltamux bench`: a user's own base and adapters, in in an engine of this process or on a running server."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from deltamux.bench.compare import Candidate, Comparison, interleave
from deltamux.bench.measure import System, drive
from deltamux.bench.report import BenchRow, times
from deltamux.bench.systems import ClientSystem, EngineSystem
from deltamux.bench.traffic import Workload
from deltamux.errors import InvalidArgumentError
from deltamux.options import Option

if TYPE_CHECKING:
    from deltamux.bench.floor import Floor
    from deltamux.client import AsyncClient
    from deltamux.deltas import BaseModel, Program
    from deltamux.engine.base import EngineOptions, ProgramRef

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """The options of a measurement.

    Attributes:
        adapters: directories where an engine is started, resource names on a running server.
        prompt_tokens: lengths of prompts, each measured on its own.

    Raises:
        InvalidArgumentError: a value is out of range; the metadata name the field.
    """

    adapters: Sequence[str] = ()
    prompt_tokens: Sequence[int] = (8,)
    new_tokens: Annotated[int, Option("tokens that each request generates", aliases=("tokens",))] = 64
    sequences: Annotated[int, Option("requests under way at once")] = 32
    repeats: Annotated[int, Option("runs that are counted; one more warms up")] = 3

    def __post_init__(self) -> None:
        for name in ("new_tokens", "sequences", "repeats"):
            if getattr(self, name) < 1:
                raise _invalid(name, f"must be at least 1, not {getattr(self, name)}")
        if not self.prompt_tokens or min(self.prompt_tokens) < 1:
            raise _invalid("prompt_tokens", "must be lengths of at least 1")
        if len(set(self.adapters)) < len(self.adapters):
            raise _invalid("adapters", "must differ: an adapter is named twice")

    def workloads(self, prompt_tokens: int) -> dict[str, Workload]:
        """Returns by name: every adapter alone, then all of them in one batch."""
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": self.new_tokens, "sequences": self.sequences}
        made = {name: Workload((name,), **sizes) for name in self.adapters}
        if len(self.adapters) > 1:
            made[f"all {len(self.adapters)} mixed"] = Workload(tuple(self.adapters), **sizes)
        return made


class _Measured(NamedTuple):
    """A system under test, and the floor of a workload where the sizes of its adapters are known."""

    system: System
    floor: Callable[[Workload], Floor] | None = None


async def bench_model(options: BenchOptions, engine: EngineOptions, progress: Progress) -> list[BenchRow]:
    """Starts an engine with the given adapters' directories and measures it.

    Raises:
        InvalidAdapterError, BaseMismatchError: a directory holds no adapter for this base.
    """
    async with _started(options, engine, progress) as measured:
        return await _rows(options, measured, progress)


async def bench_server(options: BenchOptions, client: AsyncClient, progress: Progress) -> list[BenchRow]:
    """Measures a running server; the adapters are names of those that it holds.

    Raises:
        NotFoundError: the server has no such adapter.
    """
    return await _rows(options, _Measured(ClientSystem(client)), progress)


async def _rows(options: BenchOptions, measured: _Measured, progress: Progress) -> list[BenchRow]:
    rows: list[BenchRow] = []
    for length in options.prompt_tokens:
        base = Workload((None,), length, options.new_tokens, options.sequences)
        loads = options.workloads(length)
        candidates = [_candidate(name, measured.system, load) for name, load in loads.items()]
        reference = _candidate("base", measured.system, base)
        # The base alone is compared with itself: the table then shows how noisy the machine is.
        candidates = candidates or [reference._replace(name="base again")]
        compared = await interleave(reference, candidates, options.repeats, progress)
        rows.append(BenchRow("base", length, of_base=None, **times(compared[0].whole_reference)))
        rows += [_row(c, loads.get(c.name), length, measured) for c in compared]
    return rows


def _candidate(name: str, system: System, load: Workload) -> Candidate:
    return Candidate(name, lambda seed: drive(system, load, f"{seed} {load.prompt_tokens}"))


def _row(compared: Comparison, load: Workload | None, length: int, measured: _Measured) -> BenchRow:
    known = measured.floor(load) if measured.floor and load else None
    floors = {f"floor_{name}": round(value, 3) for name, value in known._asdict().items()} if known else {}
    return BenchRow(compared.name, length, of_base=round(compared.ratio(), 3), **times(compared.whole), **floors)


@asynccontextmanager
async def _started(options: BenchOptions, given: EngineOptions, progress: Progress) -> AsyncIterator[_Measured]:
    from deltamux.bench.floor import Work, floor
    from deltamux.engine.vllm.frontend.engine import VLLMEngine

    engine = VLLMEngine(given)
    with tempfile.TemporaryDirectory(prefix="deltamux-bench-") as folder:
        compiled = compile_adapters({name: Path(name) for name in options.adapters}, engine.base, Path(folder))
        base, works = Work.of_base(engine.base), {n: Work.of_program(c.program) for n, c in compiled.items()}
        progress("starting the engine")
        await engine.start()
        try:
            refs = {name: c.ref for name, c in compiled.items()}
            yield _Measured(EngineSystem(engine, refs), lambda load: floor(base, works, load))
        finally:
            await engine.stop()


class CompiledAdapter(NamedTuple):
    """A program, and its file for the engine."""

    program: Program
    ref: ProgramRef


def compile_adapters(directories: Mapping[str, Path], base: BaseModel, folder: Path) -> dict[str, CompiledAdapter]:
    """Compiles adapters' directories into `folder`, as uploads are compiled; their plugins run in this process."""
    import torch

    from deltamux.engine.base import ProgramRef
    from deltamux.registry import Registry

    registry, compiled = Registry(), dict[str, CompiledAdapter]()
    for name, directory in directories.items():
        with torch.no_grad():
            program = registry.load(directory, base).program
        digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()
        path = folder / f"{digest}.safetensors"
        program.save(path)
        compiled[name] = CompiledAdapter(program, ProgramRef(digest, path, program.num_virtual_tokens))
    return compiled


def _invalid(name: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} {problem}", metadata={"field": name})
