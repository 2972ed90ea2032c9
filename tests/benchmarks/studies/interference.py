"""What hostile requests cost the streams of others: gaps between tokens and answers of health, with and without them.

    ../.venv/bin/python -m benchmarks.studies.interference --output interference.json     (in tests/)

One server process, eight streams that never end, and a health check every 20 ms; each kind of `hostile.INPUTS` runs
for some seconds, between seconds without any. A ratio compares a kind's seconds with the calm ones before and after it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from benchmarks.studies.hostile import INPUTS
from deltamux.bench.measure import percentile
from deltamux.client import AsyncClient
from deltamux.errors import DeltamuxError
from deltamux_testing.server_process import ServerProcess

STREAMS = 8
GROWTH = 1.5
"""The 99th percentile of the gaps may grow by half."""

HEALTH_MS = 50.0
DEMO_BASE = Path(__file__).parents[3] / "trainers/deltamux_trainers/demo/assets/base"


@dataclass
class Seen:
    """What the streams and health checks saw: (moment on the monotonic clock, seconds).

    Attributes:
        failed: streams that ended with an error, with its moment.
    """

    gaps: list[tuple[float, float]] = field(default_factory=list)
    health: list[tuple[float, float]] = field(default_factory=list)
    failed: list[tuple[float, str]] = field(default_factory=list)

    def within(self, what: str, windows: list[tuple[float, float]]) -> list[float]:
        """Returns the values of a series whose moments lie in one of the windows."""
        series: list[tuple[float, float]] = getattr(self, what)
        return [value for moment, value in series if any(start <= moment <= end for start, end in windows)]


@dataclass(frozen=True)
class Row:
    """One kind's figures; gaps in milliseconds, a chunk of n tokens counting as n gaps of an n-th of its time."""

    kind: str
    calm_p99: float
    p99: float
    calm_tokens_per_second: float
    tokens_per_second: float
    health_p99: float
    failed: int
    answers: dict[str, int]
    server_mebibytes: int

    @property
    def ratio(self) -> float:
        return self.p99 / self.calm_p99

    @property
    def is_kept(self) -> bool:
        return self.ratio <= GROWTH and self.health_p99 <= HEALTH_MS and not self.failed


# The process of the clients that are to notice nothing: ``python -m benchmarks.studies.interference --watch ADDRESS``.


async def _stream(client: AsyncClient, number: int, seen: Seen, until: float) -> None:
    while time.monotonic() < until:
        last = 0.0
        try:
            async for chunk in client.generate_stream(
                [5 + number, 17, 20], max_tokens=200, temperature=0.0, ignore_eos=True
            ):
                now, count = time.monotonic(), len(chunk.token_ids)
                if last and count:
                    seen.gaps.extend([(now, (now - last) / count)] * count)
                last = now
        except DeltamuxError as error:
            seen.failed.append((time.monotonic(), f"{error.status} {error.reason}"))
            await asyncio.sleep(0.1)


async def _ask_health(channel: grpc.aio.Channel, seen: Seen, until: float) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    while time.monotonic() < until:
        started = time.monotonic()
        with suppress(grpc.aio.AioRpcError):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        seen.health.append((time.monotonic(), time.monotonic() - started))
        await asyncio.sleep(0.02)


# The measurement.


def measure(server: ServerProcess, kinds: list[str], seconds: float) -> list[Row]:
    windows: list[tuple[float, float, dict[str, int], int]] = []
    calm: list[tuple[float, float]] = []
    total = 8 + len(kinds) * (2 * seconds + 30)
    watcher = _start("benchmarks.studies.interference", "--watch", server.address, "--seconds", str(total))
    time.sleep(8)
    for kind in kinds:
        calm.append(_calm(seconds))
        attacker = _start("benchmarks.studies.hostile", server.address, kind, str(seconds), niceness=19)
        assert attacker.stdout is not None
        attacker.stdout.readline()  # it has been loaded, which costs as much as an attack
        start = time.monotonic()
        answers, _ = attacker.communicate(timeout=seconds + 120)
        windows.append((start, time.monotonic(), json.loads(answers or "{}"), _mebibytes(server.pid)))
        print(f"{kind}: {answers.strip()}", file=sys.stderr, flush=True)
        time.sleep(1)
    calm.append(_calm(seconds))
    watcher.terminate()
    output, _ = watcher.communicate(timeout=60)
    seen = Seen(**{name: [tuple(entry) for entry in entries] for name, entries in json.loads(output).items()})
    return [_row(kind, seen, calm[n : n + 2], *windows[n]) for n, kind in enumerate(kinds)]


def _row(
    kind: str,
    seen: Seen,
    calm: list[tuple[float, float]],
    start: float,
    end: float,
    answers: dict[str, int],
    mebibytes: int,
) -> Row:
    quiet, loud = seen.within("gaps", calm), seen.within("gaps", [(start, end)])
    return Row(
        kind,
        calm_p99=1000 * percentile(quiet, 99),
        p99=1000 * (percentile(loud, 99) if loud else end - start),
        calm_tokens_per_second=len(quiet) / sum(b - a for a, b in calm),
        tokens_per_second=len(loud) / (end - start),
        health_p99=1000 * percentile(seen.within("health", [(start, end)]) or [end - start], 99),
        failed=sum(start <= moment <= end for moment, _ in seen.failed),
        answers=answers,
        server_mebibytes=mebibytes,
    )


def _calm(seconds: float) -> tuple[float, float]:
    start = time.monotonic()
    time.sleep(seconds)
    return start, time.monotonic()


def _start(module: str, *arguments: str, niceness: int = 0) -> subprocess.Popen[str]:
    nice = ["nice", "-n", str(niceness)] if niceness else []
    return subprocess.Popen([*nice, sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)


def _mebibytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss) >> 20


def table_of(rows: list[Row]) -> Table:
    table = Table(title=f"{STREAMS} streams and health, during hostile requests")
    for name in ("input", "p99 gap, ms", "calm", "ratio", "tokens/s", "calm", "health p99, ms", "kept", "answers"):
        table.add_column(name, justify="left" if name in ("input", "answers") else "right")
    for row in rows:
        answers = ", ".join(f"{count} {answer}" for answer, count in row.answers.items())
        figures = (row.p99, row.calm_p99, row.ratio, row.tokens_per_second, row.calm_tokens_per_second, row.health_p99)
        table.add_row(row.kind, *(f"{figure:.2f}" for figure in figures), "yes" if row.is_kept else "NO", answers)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_BASE, help="the base (default: the demo's)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each kind, and of the calm before it")
    parser.add_argument("--kind", action="append", choices=list(INPUTS), help="this kind alone; may be repeated")
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--watch", metavar="ADDRESS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.watch:
        _watch_until_told(given.watch, given.seconds)
        return
    with tempfile.TemporaryDirectory() as directory:
        server = ServerProcess(given.model, Path(directory) / "store", "--max-num-seqs", "16", eager=False)
        try:
            rows = measure(server, given.kind or list(INPUTS), given.seconds)
        finally:
            server.stop()
    Console(width=200).print(table_of(rows))
    if given.output:
        record = {"date": date.today().isoformat(), "machine": platform.processor(), "seconds": given.seconds}
        rows_out = [asdict(row) | {"ratio": row.ratio, "kept": row.is_kept} for row in rows]
        given.output.write_text(json.dumps(record | {"rows": rows_out}, indent=1))
    sys.exit(0 if all(row.is_kept for row in rows) else 1)


def _watch_until_told(address: str, seconds: float) -> None:
    import signal

    async def run() -> Seen:
        seen, loop = Seen(), asyncio.get_running_loop()
        async with AsyncClient(address) as client, grpc.aio.insecure_channel(address) as channel:
            until = time.monotonic() + seconds
            streams = [_stream(client, number, seen, until) for number in range(STREAMS)]
            work = asyncio.gather(_ask_health(channel, seen, until), *streams)
            loop.add_signal_handler(signal.SIGTERM, work.cancel)
            with suppress(asyncio.CancelledError):
                await work
        return seen

    print(json.dumps(asdict(asyncio.run(run()))))


if __name__ == "__main__":
    main()
