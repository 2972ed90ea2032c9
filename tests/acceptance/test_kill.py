"""kill -9 at any instant: what was acknowledged is there, and the service comes back or ends, as it was told."""

from __future__ import annotations

import time
from pathlib import Path

from storms.kill import Storm


def test_what_was_acknowledged_outlives_engine_compiler_and_server_and_the_service_comes_back(tmp_path: Path) -> None:
    with Storm(tmp_path, seed=int(time.time())) as storm:
        for victim in ("compiler", "engine", "server"):
            if victim == "server":
                storm.options += ["--on-engine-death", "exit"]
            found = storm.round(victim)
            assert not found.problems, found
            assert found.acknowledged > 0, "something must have been acknowledged, or this test could not fail"
        storm.engine_process().kill()
        assert storm.server.wait() == 1
        assert "ENGINE_LOST" in storm.server.log()
