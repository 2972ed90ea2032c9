"""What becomes of an engine's processes when the server is killed while they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SLOW = """
import multiprocessing, os, time

if os.environ.get("SLOW") and multiprocessing.parent_process() is not None:  # as where vLLM is imported
    time.sleep(60)


def run():
    time.sleep(60)


def core():
    os.environ["SLOW"] = "1"
    worker = multiprocessing.get_context("spawn").Process(target=run)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""
SERVER = """
import multiprocessing, sys, threading, time
from deltamux.engine.vllm.processes import starting
import os, slow

if __name__ == "__main__":
    method, of_core = sys.argv[1], sys.argv[2] == "worker"
    if not of_core:
        os.environ["SLOW"] = "1"
    with starting(afresh=method == "spawn"):
        child = multiprocessing.get_context(method).Process(target=slow.core if of_core else slow.run)
        child.start()
    if not of_core:
        print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", ["core", "worker"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_an_engine_starts_ends_with_a_killed_server_before_its_own_code_runs(
    method: str, process: str, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "server.py").write_text(SERVER)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, str(tmp_path / "server.py"), method, process]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as server:
        assert server.stdout is not None
        child = psutil.Process(int(server.stdout.readline()))
        time.sleep(0.2 if (method, process) == ("fork", "core") else 1.0)  # it is in its target, or in the import
        assert child.status() == psutil.STATUS_SLEEPING
        server.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([child], timeout=5)
        for left in alive:
            left.kill()
    assert not alive
