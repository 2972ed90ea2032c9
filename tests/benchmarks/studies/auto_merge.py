"""What folding a dominant adapter gives: each with all of the rows and with nine tenths, on two engines side by side.

    python -m benchmarks.studies.auto_merge --output folding.json     (in tests/)

One engine folds and the other never does; all ratios are to the base on the engine that never folds, in the same round.
The last rows have no dominant adapter: there, folding should cost nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch

from benchmarks.inputs import SIZES, Inputs, write_base
from benchmarks.parts import SETTLE_SECONDS
from benchmarks.running_systems import RunningSystems
from deltamux.bench import Candidate, Comparison, EngineSystem, Workload, drive, interleave
from deltamux.deltas import BaseModel, Dense, Op, Program, SignDense
from deltamux.deltas.ops.sign_dense import pack_signs
from deltamux.engine.base import ProgramRef

SEQUENCES = 32
OTHERS: tuple[str | None, ...] = (None, "lora-1", None)
"""What the last tenth of the rows belongs to."""
EVEN = tuple(f"lora-{i}" for i in range(8))
WARM_RUNS = range(3, 11)
"""Runs of a workload before its measurement: enough to unfold what was folded for another, and to fold its own."""


def mostly(adapter: str) -> tuple[str | None, ...]:
    return (adapter,) * (SEQUENCES - len(OTHERS)) + OTHERS


LOADS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "full": {"full fine-tuning, all": ("full",), "full fine-tuning, 29 of 32": mostly("full")},
    "one-bit": {"one bit a weight, all": ("one-bit",), "one bit a weight, 29 of 32": mostly("one-bit")},
    "lora": {"LoRA, all": ("lora-0",), "LoRA, 29 of 32": mostly("lora-0")},
    "none": {"base": (None,), "8 LoRAs evenly": EVEN},
}
"""Adapters that are dealt to the sequences, by name of the workload and of what dominates."""


@dataclass(frozen=True)
class Row:
    """One workload on one of the engines; ratios are medians of the rounds, `low` and `high` the extremes.

    Attributes:
        folds: whether the engine is the one that folds; folded: whether it had an adapter folded at the end.
    """

    name: str
    folds: bool
    folded: bool
    tokens_per_second: float
    of_base: float
    low: float
    high: float

    @classmethod
    def of(cls, name: str, compared: Comparison, *, folds: bool, folded: bool) -> Row:
        rate, ratios = compared.whole.tokens_per_second, compared.ratios()
        figures = [round(figure, 3) for figure in (rate, compared.ratio(), min(ratios), max(ratios))]
        return cls(name, folds, folded, *figures)


@dataclass(frozen=True)
class Bench:
    """Two engines over the same inputs, which differ in nothing else."""

    systems: RunningSystems
    folding: EngineSystem
    plain: EngineSystem
    tokens: int
    repeats: int

    async def rows(self, name: str, adapters: tuple[str | None, ...]) -> list[Row]:
        """Measures a workload on both engines, where its adapters alone are resident."""
        load = Workload(adapters, new_tokens=self.tokens, sequences=SEQUENCES)
        engines = {"off": self.plain, "folding": self.folding}
        for engine in engines.values():
            if own := frozenset(a for a in adapters if a is not None):
                await self.systems.settle(engine, own)
        await self._warm(load)
        base = self._candidate("base", self.plain, replace(load, adapters=(None,)))
        both = [self._candidate(each, engine, load) for each, engine in engines.items()]
        off, on = await interleave(base, both, self.repeats, settle_seconds=SETTLE_SECONDS)
        folded = await self._is_folded()
        return [Row.of(name, off, folds=False, folded=False), Row.of(name, on, folds=True, folded=folded)]

    def _candidate(self, name: str, engine: EngineSystem, load: Workload) -> Candidate:
        return Candidate(name, lambda seed: drive(engine, load, seed))

    async def _warm(self, load: Workload) -> None:
        for number in range(WARM_RUNS.stop):
            if number >= WARM_RUNS.start and await self._is_folded():
                return
            await drive(self.folding, load, f"warm {number}")

    async def _is_folded(self) -> bool:
        return (await self.folding.engine.stats()).folded_program is not None


def programs(inputs: Inputs) -> dict[str, ProgramRef]:
    """Returns a full fine-tuning, the same kind in one bit a weight, and the LoRAs."""
    kinds: dict[str, Callable[[torch.Tensor], Op]] = {
        "full": lambda change: Dense(0.02 * change),
        "one-bit": lambda change: SignDense(pack_signs(change), 0.01),
    }
    made = {name: _saved(_full(inputs.base, kind), inputs.folder, name) for name, kind in kinds.items()}
    return {**made, **{name: inputs.programs[name] for name in EVEN}}


def _full(base: BaseModel, kind: Callable[[torch.Tensor], Op]) -> Program:
    generator = torch.Generator().manual_seed(0)
    return Program.of(
        (s.name, kind(torch.randn(s.out_features, s.in_features, generator=generator))) for s in base.linears
    )


def _saved(program: Program, folder: Path, name: str) -> ProgramRef:
    path = folder / f"{name}.safetensors"
    program.save(path)
    return ProgramRef(name, path, program.num_virtual_tokens)


HEAD = f"{'workload':27}  {'engine':7}  {'folded':6}  {'tokens/s':>8}  {'of base':>7}  rounds"


def line(row: Row) -> str:
    engine, folded = "folding" if row.folds else "off", "yes" if row.folded else "no"
    figures = f"{row.tokens_per_second:8.0f}  {row.of_base:7.3f}  {row.low:.3f} to {row.high:.3f}"
    return f"{row.name:27}  {engine:7}  {folded:6}  {figures}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.auto_merge", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="a random base of this size (default: tiny)")
    parser.add_argument("--only", nargs="+", choices=LOADS, default=list(LOADS), help="what dominates (default: each)")
    parser.add_argument("--tokens", type=int, default=64, help="generated by each of 32 sequences (default: 64)")
    parser.add_argument("--repeats", type=int, default=2, help="rounds that count (default: 2)")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(arguments)


async def measure(given: argparse.Namespace, folder: Path) -> list[Row]:
    inputs = Inputs.build(write_base(folder / "base", SIZES[given.size]), folder)
    systems, rows = RunningSystems(inputs, SEQUENCES, 128 + given.tokens, lambda text: None), list[Row]()
    made = programs(inputs)
    try:
        folding = await systems.ours(programs=made)
        plain = await systems.ours(programs=made, fold_dominant=False)
        bench = Bench(systems, folding, plain, given.tokens, given.repeats)
        print(HEAD, flush=True)
        for name, adapters in [pair for kind in given.only for pair in LOADS[kind].items()]:
            added = await bench.rows(name, adapters)
            print(*map(line, added), sep="\n", flush=True)
            rows += added
            _write(given, rows)  # what is measured is kept, whatever comes after it
    finally:
        await systems.close()
    return rows


def _write(given: argparse.Namespace, rows: Sequence[Row]) -> None:
    if given.output:
        about = {"date": f"{date.today()}", "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})"}
        about |= {"base": given.size, "tokens": given.tokens, "repeats": given.repeats}
        given.output.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    warnings.filterwarnings("ignore")  # what libraries say of themselves
    with tempfile.TemporaryDirectory(prefix="deltamux-folding-") as folder:
        asyncio.run(measure(parse(arguments), Path(folder)))


if __name__ == "__main__":
    main()
