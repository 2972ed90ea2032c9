"""What a store of 10,000 adapters costs its server, compared with one of 5: start-up, memory, listing, Zipf traffic.

    ../.venv/bin/python -m benchmarks.studies.registry --output registry.json     (in tests/)

Two servers with the same slots and 1,000 places in host memory run at the same time and are measured alternately. Every
adapter is a version, an object and a program of its own to store and engine; the files of 32 LoRAs are linked under
their names, so that the disk need not hold 10,000.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from benchmarks.inputs import NUM_LORAS, SIZES, Inputs, write_base
from benchmarks.parts import FEW, SETTLE_SECONDS, ZIPF_EXPONENT
from benchmarks.running_systems import HOST_ADAPTERS, KV_CACHE_GIB, served_name
from benchmarks.studies.startup import Start
from deltamux.bench import Candidate, ClientSystem, Comparison, Workload, drive, interleave
from deltamux.client import AsyncClient
from deltamux.store import AdapterKey, AdapterStore, CompiledAdapter
from deltamux.store.objects import PROGRAM_FILE
from deltamux_testing.server_process import ServerProcess

LISTINGS = 3
SEQUENCES = 32


@dataclass(frozen=True)
class Registry:
    """A server's figures.

    Attributes:
        register_ms: of one adapter, durably, in the store (what compiles and checks an upload is not in it).
        open_ms: of opening the store again.
        start_seconds: of one start of the server, from command to ready.
        list_seconds: of listing all of them over gRPC.
    """

    adapters: int
    register_ms: float
    open_ms: float
    start_seconds: float
    mebibytes: int
    list_seconds: float


def register(inputs: Inputs, root: Path, count: int) -> tuple[float, float]:
    """Fills a store; returns the milliseconds that an adapter takes, and those that opening it again takes."""
    store, began = AdapterStore.open(root), time.perf_counter()
    for number in range(count):
        program = inputs.programs[f"lora-{number % NUM_LORAS}"].path
        digest = hashlib.sha256(b"%d" % number).hexdigest()
        with store.staging() as staged:
            os.link(program, staged / PROGRAM_FILE)
            compiled = CompiledAdapter(digest, "lora", 8, 0, program.stat().st_size)
            store.commit(staged, AdapterKey("bench", name(number)), compiled)
    store.close()
    filled = time.perf_counter()
    AdapterStore.open(root).close()
    return 1000 * (filled - began) / count, 1000 * (time.perf_counter() - filled)


def name(number: int) -> str:
    return f"a{number}"


async def serve(inputs: Inputs, count: int, slots: int, stack: AsyncExitStack) -> tuple[Registry, ClientSystem]:
    """Starts a server with so many adapters, which ends with the stack."""
    root = inputs.folder / f"store-{count}"
    register_ms, open_ms = await asyncio.to_thread(register, inputs, root, count)
    given = {
        "--dtype": "bfloat16",
        "--max-num-seqs": SEQUENCES,
        "--max-active-adapters": slots,
        "--max-host-adapters": HOST_ADAPTERS,
        "--kv-cache-gib": KV_CACHE_GIB,
    }
    options, began = [str(part) for pair in given.items() for part in pair], time.perf_counter()
    process = await asyncio.to_thread(ServerProcess, inputs.model, root, *options, eager=False)
    stack.push_async_callback(asyncio.to_thread, process.stop)
    start = Start.of(time.perf_counter() - began, process.pid)
    client = await stack.enter_async_context(AsyncClient(process.address, timeout=600))
    registry = Registry(count, register_ms, open_ms, start.seconds, start.mebibytes, await list_seconds(client))
    return registry, ClientSystem(client)


async def list_seconds(client: AsyncClient) -> float:
    seconds = []
    for _ in range(LISTINGS):
        began = time.perf_counter()
        await client.list_adapters("tenants/bench")
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


async def traffic(many: ClientSystem, few: ClientSystem, count: int, given: argparse.Namespace) -> Comparison:
    """Sends the same shape of Zipf traffic to each server, over all of its adapters."""

    def candidate(label: str, system: ClientSystem, adapters: int) -> Candidate:
        names = tuple(served_name(name(number)) for number in range(adapters))
        load = Workload(names, new_tokens=32, sequences=SEQUENCES, requests=given.requests, zipf=ZIPF_EXPONENT)
        return Candidate(label, lambda seed: drive(system, load, seed))

    own, other = candidate("many", many, count), candidate("few", few, FEW)
    return (await interleave(other, [own], given.repeats, settle_seconds=SETTLE_SECONDS))[0]


async def measure(given: argparse.Namespace, folder: Path) -> tuple[list[Registry], Comparison]:
    inputs = Inputs.build(write_base(folder / "base", SIZES[given.size]), folder)
    async with AsyncExitStack() as unmeasured:
        await serve(inputs, 1, given.slots, unmeasured)  # fills the cache of compiled code
    async with AsyncExitStack() as stack:
        few, few_subject = await serve(inputs, FEW, given.slots, stack)
        many, many_subject = await serve(inputs, given.adapters, given.slots, stack)
        return [few, many], await traffic(many_subject, few_subject, given.adapters, given)
    raise AssertionError("the stack swallows no error")


def show(registries: list[Registry], compared: Comparison) -> None:
    print("adapters  register ms  open ms  start s  memory MiB  list all s  tokens/s  first token ms")
    sides = zip(registries, (compared.whole_reference, compared.whole), strict=True)
    for own, measured in sides:
        figures = [f"{own.adapters:8,}", f"{own.register_ms:11.1f}", f"{own.open_ms:7.1f}", f"{own.start_seconds:7.1f}"]
        figures += [f"{own.mebibytes:10,}", f"{own.list_seconds:10.3f}", f"{measured.tokens_per_second:8.0f}"]
        print("  ".join([*figures, f"{1000 * measured.median_first_token:14.1f}"]))
    ratios = compared.ratios()
    print(f"tokens/s, many : few = {compared.ratio():.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="a random base of this size (default: tiny)")
    parser.add_argument("--adapters", type=int, default=10_000, help="registered with one of the servers")
    parser.add_argument("--slots", type=int, default=SEQUENCES, help="in device memory (default: 32)")
    parser.add_argument("--requests", type=int, default=256, help="in a round, 32 at once (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


def main() -> None:
    warnings.filterwarnings("ignore")  # what libraries say of themselves
    given = parse()
    with tempfile.TemporaryDirectory(prefix="deltamux-registry-") as folder:
        registries, compared = asyncio.run(measure(given, Path(folder)))
    show(registries, compared)
    if given.output:
        about = {"date": f"{date.today()}", "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})"}
        given.output.write_text(
            json.dumps(
                {
                    **about,
                    **{key: getattr(given, key) for key in ("size", "slots", "requests")},
                    "ratios": compared.ratios(),
                    "servers": [asdict(registry) for registry in registries],
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
