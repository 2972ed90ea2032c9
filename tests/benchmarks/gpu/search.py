"""Searches the configs of shrink and expand that are fastest on this GPU (`launches.DECODE` and `PREFILL`).

    cd tests && ../.venv/bin/python -m benchmarks.gpu.search --size 8b --output configs.json

First expand with today's shrink, then shrink with the best expand, then the best few of expand once more, longer.
Times are of one layer's linear modules with their LoRAs, by CUDA graphs that alternate (`benchmarks.gpu.kernels`).
Most of the minutes that it takes are Triton's compiler's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

import torch

from benchmarks.command import command, write_output
from benchmarks.gpu.inputs import SIZES
from benchmarks.gpu.kernels import LAYERS, Layer, captured, microseconds, steps
from benchmarks.inputs import Size
from deltamux.deltas.backends.triton import launches
from deltamux.deltas.backends.triton.launches import LaunchConfig

WARPS_OF_COLUMNS = {False: [(64, 2), (64, 4), (128, 2), (128, 4)], True: [(32, 4), (64, 4), (128, 4), (128, 8)]}
SPANS = {False: [128, 256, 512, 1024], True: [128, 256, 512, 1024, 2048]}
SPLITS = {
    False: [(1024, 4), (512, 8), (256, 16), (512, 28)],
    True: [(4096, 1), (1024, 2), (1024, 4), (512, 8), (1024, 14)],
}
"""The least columns of a split, and the most splits."""
START = {False: launches.DECODE, True: launches.PREFILL}


class Timed(NamedTuple):
    """Microseconds of a layer by number of adapters, and their geometric mean."""

    config: LaunchConfig
    times: dict[int, float]

    @property
    def mean(self) -> float:
        return math.prod(self.times.values()) ** (1 / len(self.times))


def expands(start: LaunchConfig, *, tall: bool) -> list[LaunchConfig]:
    """Returns configs that differ in what a program of expand does; stages are for spans of several blocks."""
    return [
        start._replace(columns=columns, expand_warps=warps, span=span, stages=stages)
        for (columns, warps), span, stages in product(WARPS_OF_COLUMNS[tall], SPANS[tall], (1, 2, 3))
        if span > columns or (span == columns and stages == 1)
    ]


def shrinks(start: LaunchConfig, *, tall: bool) -> list[LaunchConfig]:
    """Returns configs that differ in what a program of shrink does."""
    shapes = product((16, 32, 64), (64, 128), (4,)) if tall else product((16,), (128, 256), (2, 4))
    return [
        start._replace(ranks=ranks, inner=inner, shrink_warps=warps, split=split, max_splits=most)
        for (ranks, inner, warps), (split, most) in product(shapes, SPLITS[tall])
    ]


class Bench:
    """Layers whose launches can be cut anew, and steps of so many rows."""

    def __init__(self, size: Size, rows: int, adapters: Iterable[int], rank: int) -> None:
        self._layers = [Layer(size, rows, rank) for _ in range(LAYERS)]
        self._steps = {count: steps(rows, count)[0] for count in adapters}
        self.tall = launches.launch_config(next(iter(self._steps.values()))) is launches.PREFILL

    def base(self) -> float:
        """Returns the microseconds of a layer without deltas."""

        def every() -> None:
            for layer in self._layers:
                layer.base()

        return microseconds({"base": captured(every)})["base"]

    def timed(self, configs: Iterable[LaunchConfig], rounds: int) -> list[Timed]:
        """Returns the configs with their times, the fastest first; what does not fit the GPU is left out, and named."""
        graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        for config in configs:
            try:
                graphs |= {(config, count): self._graph(config, count) for count in self._steps}
            except Exception as error:  # Triton's compiler and torch have one each for what does not fit
                print(f"{tuple(config)}: {error}", file=sys.stderr)
        times = microseconds(graphs, rounds=rounds, replays=4)
        made = {config for config, _ in graphs}
        return sorted(
            (Timed(config, {n: times[config, n] for n in self._steps}) for config in made), key=lambda timed: timed.mean
        )

    def _graph(self, config: LaunchConfig, count: int) -> torch.cuda.CUDAGraph:
        setattr(launches, "PREFILL" if self.tall else "DECODE", config)
        for layer in self._layers:
            for made in layer.made:
                made.deltas.add_spans(config.span)

        def every() -> None:
            for layer in self._layers:
                layer.ours(self._steps[count])

        return captured(every)


def search(bench: Bench, start: LaunchConfig) -> dict[str, list[Timed]]:
    found = {"expand": bench.timed(expands(start, tall=bench.tall), 5)}
    best = found["expand"][0].config
    found["shrink"] = bench.timed([best, *shrinks(best, tall=bench.tall)], 5)
    best = found["shrink"][0].config
    few = {
        best._replace(columns=config.columns, expand_warps=config.expand_warps, span=config.span, stages=config.stages)
        for config, _ in found["expand"][:4]
    }
    found["both"] = bench.timed({best, start, *few}, 9)
    return found


def main() -> int:
    parser = command("benchmarks.gpu.search", __doc__, SIZES, "8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu.search: no CUDA device", file=sys.stderr)
        return 2
    results: dict[int, Any] = {}
    for rows in given.rows:
        bench = Bench(SIZES[given.size], rows, given.adapters, given.rank)
        print(f"{rows} rows; products alone {bench.base():.1f} microseconds a layer", flush=True)
        results[rows] = {}
        for kernel, every in search(bench, START[bench.tall]).items():
            results[rows][kernel] = [(timed.config._asdict(), timed.times) for timed in every]
            for timed in every[:6]:
                print(
                    f"{kernel:6} {timed.mean:8.1f} ",
                    {n: round(t, 1) for n, t in timed.times.items()},
                    timed.config,
                    flush=True,
                )
    result = {"device": torch.cuda.get_device_name(), "size": given.size, "microseconds_per_layer": results}
    write_output(given.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
