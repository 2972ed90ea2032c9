"""kill -9 of engine, compiler and server at random instants, under clients that remember what was acknowledged.

``cd tests && python -m storms.kill --rounds 100 --seed 1 --json out.json`` starts a server on a tiny base; only the
server is ever started again from outside, as an init system would. A round kills one process, waits until the service
is back, and compares every adapter with its client's record: nothing acknowledged is lost, nothing is half there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from deltamux.client import Client
from deltamux.conformance.bases import save_base
from deltamux.deltas import BaseModel
from deltamux.errors import DeltamuxError
from deltamux_testing.adapters import write_own
from deltamux_testing.server_process import ServerProcess
from storms.clients import Kind, StormClient, answer

VICTIMS = ("engine", "compiler", "server")
METHODS = {"lora": {"r": 4}, "houlsby": {"bottleneck": 8}, "prefix": {"num_virtual_tokens": 5}}
CALM = "tenants/calm/adapters"
OPTIONS = ("--max-lora-rank", "16", "--drain-seconds", "5", "--engine-restarts", "1000")


@dataclass(frozen=True)
class Round:
    """What one round showed.

    Attributes:
        after: seconds of traffic before the kill.
        back: seconds from the kill until a generation and an upload were answered.
        acknowledged: calls that were answered since the round before.
        turned_away: calls that ended with UNAVAILABLE.
    """

    number: int
    victim: str
    after: float
    back: float
    acknowledged: int
    turned_away: int
    problems: tuple[str, ...]


class Storm:
    """A server, its clients, and the kills. Use it as a context manager.

    Args:
        directory: for the base, the adapters and the store.
        bound: seconds within which the service must be back.
        longest: seconds of traffic before a kill, at most.

    Attributes:
        options: of the server, from its next start on.
    """

    def __init__(
        self, directory: Path, *, num_clients: int = 8, seed: int = 0, bound: float = 240.0, longest: float = 4.0
    ) -> None:
        self.options = list(OPTIONS)
        self.store = directory / "store"
        self.rounds: list[Round] = []
        self._base = save_base(directory / "base", "llama")
        self._adapters = {name: write_adapter(self._base, directory / name, name) for name in KINDS}
        self._random = random.Random(seed)
        self._seed = seed
        self._num_clients = num_clients
        self._bound = bound
        self._longest = longest
        self._address = f"127.0.0.1:{free_port()}"
        self._go = threading.Event()
        self.clients: list[StormClient] = []
        self.server = self._started()

    def __enter__(self) -> Storm:
        try:
            self._gather()
        except BaseException:
            self.server.kill()
            raise
        return self

    def _gather(self) -> None:
        with self.server.client() as client:
            kinds = {name: self._kind(client, name) for name in self._adapters}
        assert len({kind.answer for kind in kinds.values()}) == len(kinds), "every content must answer differently"
        for number in range(self._num_clients):
            seed = self._seed * 1000 + number
            self.clients.append(StormClient(f"tenant{number}", self._address, kinds, self._go, seed))
            self.clients[-1].start()

    def __exit__(self, *raised: object) -> None:
        for client in self.clients:
            client.end()
        self._go.clear()
        for client in self.clients:
            client.join(timeout=150)
        with suppress(psutil.NoSuchProcess):
            self.server.kill()

    def round(self, victim: str) -> Round:
        """Kills a process amid traffic, waits for the service, and compares the clients' records with the server."""
        before = self._counted()
        self._go.set()
        after = self._random.uniform(0.0, self._longest)
        time.sleep(after)
        killed = time.monotonic()
        self._kill(victim)
        problems = [] if self._is_back(killed) else [f"the service is not back within {self._bound:g} s"]
        back = time.monotonic() - killed
        with self._calm():
            problems += self._compared()
        done, away = (now - then for now, then in zip(self._counted(), before, strict=True))
        found = Round(len(self.rounds) + 1, victim, after, back, done, away, tuple(problems))
        self.rounds.append(found)
        return found

    def engine_process(self) -> psutil.Process:
        """Returns one of the engine's processes, the scheduler's or a worker's."""
        return self._random.choice(self._processes(lambda name: "VLLM::" in name))

    def _kill(self, victim: str) -> None:
        if victim == "server":
            self.server.kill()
            self.server = self._started()
            return
        process = (
            self.engine_process()
            if victim == "engine"
            else self._processes(lambda name: "deltamux.server.compiling.child" in name)[0]
        )
        process.kill()

    def _processes(self, wanted: Callable[[str], bool]) -> list[psutil.Process]:
        found = []
        for process in self.server.workers():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if wanted(" ".join([process.name(), *process.cmdline()])):
                    found.append(process)
        return found

    def _is_back(self, killed: float) -> bool:
        """Waits until a generation and an upload are answered, not longer than the bound."""
        while time.monotonic() - killed < self._bound:
            try:
                with Client(self._address, timeout=60) as client:
                    answer(client, None)
                    client.upload_adapter(f"{CALM}/probe", self._adapters["lora-1"])
                return True
            except DeltamuxError:
                time.sleep(0.2)
        return False

    @contextmanager
    def _calm(self) -> Iterator[None]:
        """Holds all clients still for the length of the block."""
        self._go.clear()
        with ExitStack() as stack:
            for client in self.clients:
                stack.enter_context(client.busy)
            yield

    def _compared(self) -> list[str]:
        with Client(self._address, timeout=120) as client:
            for one in self.clients:
                one.verify(client)
        problems = [problem for one in self.clients for problem in one.problems]
        for one in self.clients:
            one.problems.clear()
        if left := list((self.store / "staging").iterdir()):
            problems.append(f"{len(left)} uploads are left half way in the store")
        objects = (self.store / "objects").glob("*/*")
        bare = [directory.name for directory in objects if not (directory / "program.safetensors").is_file()]
        return problems + [f"object {name} has no program" for name in bare]

    def _counted(self) -> tuple[int, int]:
        done = sum(sum(client.done.values()) for client in self.clients)
        return done, sum(sum(client.turned_away.values()) for client in self.clients)

    def _started(self) -> ServerProcess:
        return ServerProcess(self._base, self.store, *self.options, "--listen", self._address)

    def _kind(self, client: Client, name: str) -> Kind:
        version = client.upload_adapter(f"{CALM}/{name}", self._adapters[name])
        return Kind(self._adapters[name], version.digest, answer(client, version.name))


KINDS = tuple(f"{method}-{seed}" for method in METHODS for seed in (1, 2))


def write_adapter(base: Path, directory: Path, kind: str) -> Path:
    method, _, seed = kind.partition("-")
    return write_own(method, BaseModel.from_pretrained(base), directory, seed=int(seed), **METHODS[method])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def order(rounds: int, rng: random.Random) -> Iterator[str]:
    """Yields victims: each once in three rounds, in random order."""
    for start in range(0, rounds, len(VICTIMS)):
        yield from rng.sample(VICTIMS, min(len(VICTIMS), rounds - start))


def show(found: Round) -> None:
    row = f"{found.number:>5}  {found.victim:<9} {found.after:>7.2f} {found.back:>8.1f} {found.acknowledged:>13}"
    print(f"{row} {found.turned_away:>12}  {len(found.problems)}", flush=True)
    for problem in found.problems[:5]:
        print(f"       {problem}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m storms.kill", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bound", type=float, default=240.0, help="seconds within which the service must be back")
    parser.add_argument("--json", type=Path, help="where to write the rounds")
    given = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="deltamux-storm-"))
    print("round  victim      after s   back s  acknowledged  unavailable  problems", flush=True)
    with Storm(directory, num_clients=given.clients, seed=given.seed, bound=given.bound) as storm:
        for victim in order(given.rounds, random.Random(given.seed)):
            show(storm.round(victim))
        done: Counter[str] = sum((client.done for client in storm.clients), Counter())
    problems = sum(len(found.problems) for found in storm.rounds)
    print(f"{len(storm.rounds)} rounds, {problems} problems; acknowledged: {dict(done)}", flush=True)
    if given.json is not None:
        rounds = [asdict(found) for found in storm.rounds]
        given.json.write_text(json.dumps({"seed": given.seed, "rounds": rounds, "acknowledged": done}, indent=2))
    if problems:
        print(f"the store and the server's log are kept in {directory}", file=sys.stderr)
    else:
        shutil.rmtree(directory)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
