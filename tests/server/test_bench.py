"""`deltamux bench` against a running server."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from deltamux.bench.run import BenchOptions, bench_server
from deltamux.client import AsyncClient
from deltamux.errors import NotFoundError
from deltamux_testing.servers import Served

NAMES = ("tenants/acme/adapters/one", "tenants/acme/adapters/two")


async def test_a_running_server_is_measured_with_the_adapters_that_it_holds(
    served: Served, client: AsyncClient, loras: list[Path]
) -> None:
    for name, directory in zip(NAMES, loras, strict=True):
        await client.upload_adapter(name, directory)
    code = "import sys; from deltamux.cli import main; sys.exit(main())"
    adapters = [part for name in NAMES for part in ("--adapter", name)]
    sizes = ["--tokens", "3", "--sequences", "2", "--repeats", "1", "--json"]
    command = [sys.executable, "-c", code, "bench", "--address", served.address, *adapters, *sizes]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    rows = {row["workload"]: row for row in json.loads(output)}
    assert process.returncode == 0
    assert list(rows) == ["base", *NAMES, "all 2 mixed"]
    assert rows["base"]["of_base"] is None
    assert all(rows[name]["of_base"] > 0 for name in (*NAMES, "all 2 mixed"))
    assert all(row["first_token_p50"] > 0 and row["gap_p99"] >= row["gap_p50"] > 0 for row in rows.values())


async def test_an_adapter_that_the_server_lacks_is_named_by_its_own_error(client: AsyncClient) -> None:
    options = BenchOptions(("tenants/acme/adapters/none",), new_tokens=1, sequences=1, repeats=1)
    with pytest.raises(NotFoundError, match="none"):
        await bench_server(options, client, lambda progress: None)
