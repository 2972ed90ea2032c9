"""kill -9 at any instant: what was acknowledged is there, and the service comes back or ends, as configured."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deltamux_testing.server_process import ServerProcess
from storms.kill import Storm


@pytest.mark.engine
def test_what_was_acknowledged_survives_kills_of_engine_compiler_and_server(tmp_path: Path) -> None:
    with Storm(tmp_path, num_clients=4, seed=int(time.time()), longest=2.0) as storm:
        made = shared_memory(storm.server)
        assert made, "the engine's processes talk through shared memory"
        for victim in ("compiler", "engine", "server"):
            if victim == "server":
                storm.options += ["--on-engine-death", "exit"]
            found = storm.round(victim)
            assert not found.problems, found
            assert found.acknowledged > 0, "something must have been acknowledged, or this test could not fail"
            if victim == "engine":
                assert not [file for file in made if file.exists()], "a dead engine's shared memory stays"
        storm.engine_process().kill()
        assert storm.server.wait() == 1
        assert "ENGINE_LOST" in storm.server.log()


def shared_memory(server: ServerProcess) -> set[Path]:
    """Returns the files of the shared memory that a server's processes hold."""
    held = {mapped.path for process in server.workers() for mapped in process.memory_maps()}
    return {Path(path) for path in held if path.startswith("/dev/shm/psm_")}
