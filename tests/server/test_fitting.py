"""GetBase asks the compiler which methods fit: callers who give up, plugins that hang, a process that is killed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from deltamux.deltas import BaseModel, BaseSupport
from deltamux.errors import DeadlineExceededError
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.compiling.job import Budgets, Job, encode_base
from deltamux_testing.servers import Servers
from deltamux_testing.third_party import install, method

pytestmark = pytest.mark.slow

TIMEOUT = 4.0
BUDGETS = Budgets(max_rank=64, max_virtual_tokens=64, max_bytes=1 << 30)


def slow_to_declare(name: str, seconds: int) -> str:
    return method(name).replace("    return {}\n", f"    time.sleep({seconds})\n    return {{}}\n")


@pytest.fixture(scope="module", autouse=True)
def _third_party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    plugins = {name: slow_to_declare(name, seconds) for name, seconds in (("ponders", 1), ("stalls", 1000))}
    plugins["errs"] = method("errs").replace("    return {}\n", "    return {'bias': 1}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(install(tmp_path_factory.mktemp("third-party"), plugins))
        yield


@pytest.fixture(scope="module")
async def compiler() -> AsyncIterator[Compiler]:
    async with Compiler(TIMEOUT) as compiler:
        await compiler.started()
        yield compiler


@pytest.fixture(scope="module")
def supported(tiny_base: Path) -> str:
    """The base, with an engine that takes deltas at all its sites."""
    base = BaseModel.from_pretrained(tiny_base)
    return encode_base(base, BaseSupport(frozenset((str(kind), name) for kind, name in base.sites)))


async def test_whoever_asks_and_gives_up_leaves_the_next_job_its_own_answer(
    compiler: Compiler, supported: str, loras: list[Path], tmp_path: Path
) -> None:
    before = compiler.pid
    asked = asyncio.create_task(compiler.refusal("ponders", supported))
    await asyncio.sleep(0.5)  # the process has the question
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    job = Job(Path(shutil.copytree(loras[0], tmp_path / "staged")), "", BUDGETS, supported)
    assert (await compiler.compile(job)).method == "lora"
    assert await compiler.refusal("lora", supported) == ""
    assert compiler.pid == before


async def test_a_method_whose_adapters_cannot_be_made_is_refused_and_the_process_goes_on(
    compiler: Compiler, supported: str
) -> None:
    before = compiler.pid
    assert "cannot be made: AttributeError" in (await compiler.refusal("errs", supported) or "")
    assert await compiler.refusal("lora", supported) == ""
    assert compiler.pid == before


async def test_a_method_is_not_blamed_for_a_process_that_is_killed_while_it_is_asked(
    compiler: Compiler, supported: str
) -> None:
    asked = asyncio.create_task(compiler.refusal("ponders", supported))
    await asyncio.sleep(0.5)
    psutil.Process(compiler.pid).kill()
    assert "SIGKILL" not in (await asked or "")


async def test_callers_who_give_up_do_not_keep_the_base_from_being_described_where_a_plugin_hangs(
    compiler: Compiler, tiny_base: Path, tmp_path: Path
) -> None:
    serve = Servers(tiny_base, tmp_path / "store", compiler)
    async with serve() as server, server.client(timeout=TIMEOUT / 2) as hasty, server.client() as client:
        for _ in range(2):
            with pytest.raises(DeadlineExceededError):
                await hasty.get_base()
        fits = (await client.get_base()).methods
    assert "took more than 4 s" in fits["stalls"]
    assert fits["lora"] == ""
