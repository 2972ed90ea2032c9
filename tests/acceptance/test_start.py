"""A start that is under way can be stopped."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from deltamux_testing.server_process import await_none, command

PATIENCE = 240


@pytest.mark.engine
def test_sigterm_breaks_a_start_off_and_leaves_no_process(base_directory: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        command(base_directory, tmp_path / "store", "--enforce-eager"), stdout=subprocess.PIPE, text=True
    ) as server:
        begun = await_engine(psutil.Process(server.pid))
        server.terminate()
        output, _ = server.communicate(timeout=PATIENCE)
    assert (server.returncode, output) == (0, "stopped before it was ready\n")
    # vLLM's tracker of shared memory ends with the last process that shares any.
    await_none(begun)


def await_engine(server: psutil.Process) -> list[psutil.Process]:
    """Waits until the engine's start has begun; returns the server's processes."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        children = server.children(recursive=True)
        if any("EngineCore" in " ".join([child.name(), *child.cmdline()]) for child in children):
            return children
        time.sleep(0.05)
    raise AssertionError("no engine was started")
