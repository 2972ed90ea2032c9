"""A server in this process, over a real socket, with a small engine in torch in place of vLLM, to start quickly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deltamux.client import AsyncClient
from deltamux.server.compiling.compiler import Compiler
from deltamux_testing.servers import Served, Servers
from deltamux_testing.tiny_base import write_base, write_lora


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def loras(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("tiny-loras")
    return [write_lora(root / str(seed), tiny_base, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="session")
async def shared_compiler() -> AsyncIterator[Compiler]:
    """A compiler for the tests that do not change it; its start takes longer than most tests."""
    async with Compiler(60.0) as compiler:
        yield compiler


@pytest.fixture
def serve(tiny_base: Path, tmp_path: Path, shared_compiler: Compiler) -> Servers:
    """Starts a server with the options that a test gives it."""
    return Servers(tiny_base, tmp_path / "store", shared_compiler)


@pytest.fixture
async def served(serve: Servers) -> AsyncIterator[Served]:
    """A server without keys; its engine pauses a little after every token, so that a test can act meanwhile."""
    async with serve(step_seconds=0.02) as server:
        yield server


@pytest.fixture
async def client(served: Served) -> AsyncIterator[AsyncClient]:
    async with served.client() as client:
        yield client
