"""One layer's linear modules on a GPU: its matrix products alone, with our LoRA, with vLLM's, as ratios to the first.

    cd tests && ../.venv/bin/python -m benchmarks.gpu.kernels --size 8b

Every figure is the replay of one CUDA graph over several layers, whose weights together are larger than the caches. No
engine is needed. `benchmarks.gpu.search` tries block sizes with it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.command import command, write_output
from benchmarks.gpu.inputs import SIZES
from benchmarks.inputs import Size
from deltamux.deltas import BlockRole, LinearSite, LowRank
from deltamux.deltas.backends.triton.linear import LinearDeltas
from deltamux.deltas.backends.triton.step_records import StepRecords
from deltamux.deltas.ops.step import RowRange

LAYERS = 4
SLOTS = 20
MAX_RANK: Literal[64] = 64
"""Ranks that both servers' buffers have room for; vLLM multiplies all of them."""


class Module(NamedTuple):
    """A linear module, packed of slices of so many output features each."""

    in_features: int
    parts: tuple[int, ...]


def modules(size: Size) -> list[Module]:
    hidden, inner = size.hidden, size.hidden * 7 // 2
    heads = (hidden, hidden // 4, hidden // 4)
    return [Module(hidden, heads), Module(hidden, (hidden,)), Module(hidden, (inner, inner)), Module(inner, (hidden,))]


class Layer:
    """The modules of one layer: weights, inputs and outputs, and the LoRAs of all slots as both servers hold them."""

    def __init__(self, size: Size, rows: int, rank: int) -> None:
        self.made = [_Made(module, rows, rank) for module in modules(size)]

    def base(self) -> None:
        for made in self.made:
            torch.mm(made.x, made.weight, out=made.y)

    def ours(self, step: StepRecords) -> None:
        for made in self.made:
            torch.mm(made.x, made.weight, out=made.y)
            made.deltas.apply(made.x, made.y, step)

    def vllm(self, wrapper: Any) -> None:
        for made in self.made:
            torch.mm(made.x, made.weight, out=made.y)
            wrapper.add_lora_linear(made.y, made.x, made.a, made.b, 1.0, made.module.parts)


class _Made:
    def __init__(self, module: Module, rows: int, rank: int) -> None:
        self.module, out = module, sum(module.parts)
        self.x, self.y = _draw(rows, module.in_features), _draw(rows, out)
        self.weight = _draw(module.in_features, out)
        self.a = tuple(_draw(SLOTS, 1, MAX_RANK, module.in_features) for _ in module.parts)
        self.b = tuple(_draw(SLOTS, 1, features, MAX_RANK) for features in module.parts)
        sites = [
            LinearSite(f"part{i}", module.in_features, features, True, False, 0, BlockRole.ATTENTION)
            for i, features in enumerate(module.parts)
        ]
        self.deltas = LinearDeltas(sites, SLOTS, MAX_RANK, torch.bfloat16, "cuda")
        for slot in range(SLOTS):
            for part in range(len(sites)):
                for factor in (self.a[part][slot, 0], self.b[part][slot, 0].T):
                    factor[rank:] = 0
                a, b = self.a[part][slot, 0, :rank], self.b[part][slot, 0, :, :rank]
                assert self.deltas.set(slot, part, LowRank(a.contiguous(), b.contiguous()))


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def vllm_wrapper(rows: int, slots: Sequence[int]) -> Any:
    """Returns vLLM's launcher of its LoRA kernels, for rows of given slots."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=SLOTS)
    wrapper = PunicaWrapperGPU(rows, rows, torch.device("cuda"), lora_config=config)
    ids = [slot + 1 for slot in slots]
    wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids)), list(range(1, SLOTS + 1)), SLOTS, 32_000)
    return wrapper


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(graphs: dict[Any, torch.cuda.CUDAGraph], rounds: int = 15, replays: int = 10) -> dict[Any, float]:
    """Returns the median time of each graph, alternating, divided by the layers that it holds."""
    times: dict[Any, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch leaves it so
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / replays / LAYERS)
    return {name: statistics.median(every) for name, every in times.items()}


def steps(rows: int, adapters: int) -> tuple[StepRecords, list[int]]:
    """Returns a step whose rows the adapters share evenly, and the slot of each row."""
    table = StepRecords(rows, SLOTS, "cuda")
    share = rows // adapters
    slots = [min(row // share, adapters - 1) for row in range(rows)]
    bounds = [*(slot * share for slot in range(adapters)), rows]
    table.fill([RowRange(slot, bounds[slot], bounds[slot + 1]) for slot in range(adapters)], rows)
    return table, slots


def measure(size: Size, rows: int, adapters: Sequence[int], rank: int, *, peer: bool) -> list[dict[str, Any]]:
    """Returns a row a number of adapters, with the microseconds of a layer by each way."""
    layers = [Layer(size, rows, rank) for _ in range(LAYERS)]

    def over_layers(run: Callable[[Layer], None]) -> torch.cuda.CUDAGraph:
        def every() -> None:
            for layer in layers:
                run(layer)

        return captured(every)

    results = []
    for count in adapters:
        table, slots = steps(rows, count)
        graphs = {"base": over_layers(Layer.base), "ours": over_layers(partial(Layer.ours, step=table))}
        if peer:
            graphs["vllm"] = over_layers(partial(Layer.vllm, wrapper=vllm_wrapper(rows, slots)))
        results.append({"rows": rows, "adapters": count, "rank": rank, **microseconds(graphs)})
    return results


def main() -> int:
    parser = command("benchmarks.gpu.kernels", __doc__, SIZES, "8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 2048])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--no-peer", action="store_true", help="leave vLLM's kernels out")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu.kernels: no CUDA device", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, a layer of {given.size}, rank {given.rank}; microseconds a layer")
    print(f"{'rows':>5} {'adapters':>8} {'base':>8} {'ours':>8} {'vllm':>8}   of base: ours  vllm")
    results = []
    for rows in given.rows:
        counts = [count for count in given.adapters if count <= rows]
        for row in measure(SIZES[given.size], rows, counts, given.rank, peer=not given.no_peer):
            base, ours, vllm = row["base"], row["ours"], row.get("vllm", float("nan"))
            print(
                f"{rows:5} {row['adapters']:8} {base:8.1f} {ours:8.1f} {vllm:8.1f}            {base / ours:5.2f} "
                f"{base / vllm:5.2f}",
                flush=True,
            )
            results.append(row)
    result = {"device": torch.cuda.get_device_name(), "size": given.size, "microseconds_per_layer": results}
    write_output(given.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
