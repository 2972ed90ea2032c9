"""One base, one server for the tests that do not end it, and adapters of three methods on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deltamux.client import Client
from deltamux_testing.server_process import ServerProcess
from storms.kill import KINDS, write_adapter


@pytest.fixture(scope="session")
def adapters(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of adapters: two of each method, different in content."""
    root = tmp_path_factory.mktemp("adapters")
    return {kind: write_adapter(base_directory, root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def server(
    base_directory: Path, tmp_path_factory: pytest.TempPathFactory, real_engine: None
) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("server") / "store"
    process = ServerProcess(
        base_directory, store, "--max-active-adapters", "4", "--max-host-adapters", "6", "--max-lora-rank", "16"
    )
    yield process
    assert process.stop() == 0, "the server must drain and end well on SIGTERM"


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with server.client() as client:
        yield client
