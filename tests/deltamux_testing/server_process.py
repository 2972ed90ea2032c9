"""A real server process: started as an operator starts it, stopped, or killed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from deltamux.client import Client

READY = re.compile(r"ready on (\S+)")
START_SECONDS = 480
GONE_SECONDS = 30


def command(model: Path, store: Path, *options: str) -> list[str]:
    """Returns the command line of a server for a tiny base; later options replace earlier ones."""
    deltamux = [sys.executable, "-c", "import sys; from deltamux.cli import main; sys.exit(main())"]
    given = {"--model": str(model), "--store": str(store), "--listen": "127.0.0.1:0"}
    given |= {"--dtype": "float32", "--kv-cache-gib": "0.25", "--max-model-len": "256"}
    return [*deltamux, "serve", *(word for pair in given.items() for word in pair), *options]


class ServerProcess:
    """`deltamux serve` on a free port of the loopback interface.

    Attributes:
        address: what to connect to.
        store: its store's directory.
    """

    def __init__(self, model: Path, store: Path, *options: str, eager: bool = True) -> None:
        self.store = store
        self._log = (store.parent / f"{store.name}.log").open("a+")
        self._process = subprocess.Popen(
            command(model, store, *["--enforce-eager"] * eager, *options),
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.address = self._await_ready()

    @property
    def pid(self) -> int:
        return self._process.pid

    def client(self, **options: Any) -> Client:
        return Client(self.address, timeout=120, **options)

    def workers(self) -> list[psutil.Process]:
        """Returns vLLM's processes, which a bad adapter must never take down."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def log(self) -> str:
        """Returns what it and its processes have written to standard error."""
        return Path(self._log.name).read_text()

    def kill(self) -> None:
        """kill -9, and no goodbye; what it started ends because it is gone."""
        workers = self.workers()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._close()
        await_none(workers)

    def wait(self) -> int:
        """Waits for the server to end by itself; returns the exit status."""
        status = self._process.wait(timeout=90)
        self._close()
        return status

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self._process.terminate()
        status = self._process.wait(timeout=90)
        self._close()
        return status

    def _close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _await_ready(self) -> str:
        stdout: IO[str] | None = self._process.stdout
        assert stdout is not None
        timer = threading.Timer(START_SECONDS, self._process.kill)
        timer.start()
        try:
            for line in stdout:
                if found := READY.match(line):
                    return found[1]
        finally:
            timer.cancel()
        raise AssertionError(f"the server did not start:\n{self.log()[-4000:]}")


@contextmanager
def streaming(client: Client) -> Iterator[list[tuple[int, ...]]]:
    """Generates again and again for the length of the block, each time what is generated alone; yields what came."""
    options: dict[str, Any] = {"max_tokens": 100, "temperature": 0.0, "ignore_eos": True}
    alone = client.generate([5, 6, 7], **options).token_ids
    over, answers = threading.Event(), list[tuple[int, ...]]()

    def stream() -> None:
        while not over.is_set():
            chunks = client.generate_stream([5, 6, 7], **options)
            answers.append(tuple(token for chunk in chunks for token in chunk.token_ids))

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()
    assert set(answers) == {alone}


def await_none(processes: list[psutil.Process]) -> None:
    """Waits until the processes that an ended server has started are gone."""
    deadline = time.monotonic() + GONE_SECONDS
    while left := [process for process in processes if runs(process)]:
        assert time.monotonic() < deadline, f"what the server has started outlives it: {left}"
        time.sleep(0.02)


def runs(process: psutil.Process) -> bool:
    """Whether a process does, or could do, anything: a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def title(process: psutil.Process) -> str:
    """Returns name and command line; "" of a process that has ended."""
    with suppress(psutil.NoSuchProcess):  # a zombie counts as one
        return " ".join([process.name(), *process.cmdline()])
    return ""
