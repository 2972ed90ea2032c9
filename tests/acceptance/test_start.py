"""A start that is under way can be stopped, and a server that serves, by signals to it or to all its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from deltamux.client import Client
from deltamux_testing.server_process import READY, await_none, command, title

PATIENCE = 240


@pytest.mark.engine
@pytest.mark.parametrize("begun_by", ["ForkServer", "EngineCore"])
def test_sigterm_breaks_a_start_off_and_leaves_no_process(begun_by: str, base_directory: Path, tmp_path: Path) -> None:
    output, _ = broken_off(signal.SIGTERM, begun_by, command(base_directory, tmp_path / "store", "--enforce-eager"))
    assert output == "stopped before it was ready\n"


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_modules_are_imported_ends_the_start_at_once(
    number: signal.Signals, base_directory: Path, tmp_path: Path
) -> None:
    both = broken_off(number, "forkserver", command(base_directory, tmp_path / "store"))
    assert both == ("stopped before it was ready\n", "")


def broken_off(number: signal.Signals, begun_by: str, command: list[str]) -> tuple[str, str]:
    """Signals a server once one of its processes has that name; returns its output and errors."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        begun = await_process(begun_by, psutil.Process(server.pid))
        server.send_signal(number)
        output, errors = server.communicate(timeout=PATIENCE)
    assert server.returncode == 0
    # vLLM's tracker of shared memory ends with the last process that shares any.
    await_none(begun)
    return output, errors


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_streams_run_to_their_end_when_every_process_of_the_server_gets_the_signal(
    number: signal.Signals, base_directory: Path, tmp_path: Path
) -> None:
    """As by a terminal's Ctrl-C, and by a service manager."""
    with subprocess.Popen(
        command(base_directory, tmp_path / "store", "--enforce-eager"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as server:
        assert server.stdout is not None
        ready = next(found for line in server.stdout if (found := READY.match(line)))
        begun = psutil.Process(server.pid).children(recursive=True)
        with Client(ready[1], timeout=60, retries=0) as client:
            stream = client.generate_stream([5, 6, 7], max_tokens=100, temperature=0.0, ignore_eos=True)
            tokens = len(next(stream).token_ids)
            os.killpg(server.pid, number)
            tokens += sum(len(chunk.token_ids) for chunk in stream)
        assert (tokens, server.wait(timeout=PATIENCE)) == (100, 0)
    await_none(begun)


def await_process(name: str, server: psutil.Process) -> list[psutil.Process]:
    """Waits until one of the server's processes has that name; returns them all."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        children = server.children(recursive=True)
        if any(name in title(child) for child in children):
            return children
        time.sleep(0.05)
    raise AssertionError(f"no {name} was started")
