"""The client's examples in README and quickstart run against a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deltamux_testing.pages import DOCS, ROOT, Block, blocks
from deltamux_testing.servers import Served

EXAMPLES = [
    block
    for page in (ROOT / "README.md", DOCS / "quickstart.md")
    for block in blocks(page, "python")
    if "deltamux.client" in block.text
]


@pytest.mark.parametrize("block", EXAMPLES, ids=str)
async def test_an_example_of_the_client_runs(
    block: Block, served: Served, loras: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code = block.text.replace("127.0.0.1:8470", served.address).replace("path/to/adapter", str(loras[0]))
    assert code != block.text
    await asyncio.to_thread(exec, compile(code, str(block), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
