"""What becomes of an engine's processes when the server is killed while they start."""

from __future__ import annotations

import json
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
    worker = multiprocessing.get_context(os.environ["VLLM_WORKER_MULTIPROC_METHOD"]).Process(target=run)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""
SERVER = """
import multiprocessing, os, sys, time
from deltamux.engine.vllm import fork_server
from deltamux.engine.vllm.processes import starting
import slow

if __name__ == "__main__":
    method, of_core = sys.argv[1], sys.argv[2] == "worker"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # as vLLM does
    if method == "forkserver":
        fork_server.PRELOAD = "slow"
        fork_server.start()
        os.environ.update(fork_server._platform_variables())  # as vLLM does
    if not of_core:
        os.environ["SLOW"] = "1"
    with starting():
        child = multiprocessing.get_context(method).Process(target=slow.core if of_core else slow.run)
        child.start()
    if not of_core:
        print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", ["core", "worker"])
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
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
        time.sleep(1.0)  # it is in its target, or in the import
        assert child.status() == psutil.STATUS_SLEEPING
        server.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([child], timeout=5)
        for left in alive:
            left.kill()
    assert not alive


START = """
import json, multiprocessing, os, sys
from pathlib import Path
from deltamux.engine.base import EngineOptions
from deltamux.engine.vllm import fork_server


def report():
    import torch
    from torch._inductor import config

    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_WORKER")}
    preloaded = os.environ["LD_PRELOAD"].split(":")
    mapped = {line.split()[-1] for line in open("/proc/self/maps")}
    print(json.dumps([environment, preloaded, [path in mapped for path in preloaded], torch.get_num_threads(),
                      config.cpp.dynamic_threads, config.compile_threads]), flush=True)


if __name__ == "__main__":
    fork_server.start()
    from deltamux.engine.vllm.frontend.config import engine_config
    from deltamux.engine.vllm.processes import starting

    engine_config(EngineOptions(sys.argv[1], max_model_len=64))
    assert fork_server.usable()
    with starting():
        forked = multiprocessing.get_context("forkserver").Process(target=report)
        forked.start()
    forked.join()
    spawned = multiprocessing.get_context("spawn").Process(target=report)
    spawned.start()
    spawned.join()
"""


@pytest.mark.slow
def test_a_fork_has_the_environment_and_the_libraries_of_a_process_that_vllm_spawns(
    base_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "start.py").write_text(START)
    path = os.pathsep.join(sys.path)
    forked, spawned = map(
        json.loads,
        subprocess.run(
            [sys.executable, str(tmp_path / "start.py"), str(base_directory)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        ).stdout.splitlines(),
    )
    assert forked == spawned
