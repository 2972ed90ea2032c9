"""The compiler with real processes and real distributions of bad plugins: what each affects, and what it does not."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deltamux import errors
from deltamux.deltas import BaseModel, Program
from deltamux.errors import BudgetExceededError, DeltamuxError, InvalidAdapterError, PluginError, UnavailableError
from deltamux.server.app import running
from deltamux.server.compiling import process as compiler_process
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.compiling.job import Budgets, Job, decode_error, encode_base, encode_error
from deltamux.server.options import ServeOptions
from deltamux_testing.reference_engine import ReferenceEngine
from deltamux_testing.servers import Servers
from deltamux_testing.third_party import install, method, write_adapter
from deltamux_testing.waiting import until

pytestmark = pytest.mark.slow

TIMEOUT = 4.0
BUDGETS = Budgets(max_rank=64, max_virtual_tokens=64, max_bytes=1 << 30)

BAD_HOOKS = {
    "hangs": ("time.sleep(1000)", "PLUGIN_TIMEOUT", "'hangs': deltamux_program took more than 4 s"),
    "spins": ("while True: pass", "PLUGIN_TIMEOUT", "'spins': deltamux_program took more than 4 s"),
    "leaves": ("os._exit(7)", "PLUGIN_CRASHED", "'leaves': deltamux_program ended its process with exit status 7"),
    "segfaults": (
        "os.kill(os.getpid(), signal.SIGSEGV)",
        "PLUGIN_CRASHED",
        "'segfaults': deltamux_program ended its process by SIGSEGV",
    ),
    "kills": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "PLUGIN_CRASHED",
        "'kills': deltamux_program ended its process by SIGKILL",
    ),
    "exits": ("sys.exit(3)", "PLUGIN_ERROR", "'exits' failed in deltamux_program: SystemExit: 3"),
    "raises": ("[][0]", "PLUGIN_ERROR", "'raises' failed in deltamux_program: IndexError"),
    "returns": ("return 42", "PLUGIN_ERROR", "'returns': deltamux_program returned int"),
    "misbuilds": (
        "return Program(42)",
        "PLUGIN_ERROR",
        "'misbuilds' failed in the check of its program: TypeError",
    ),
    "invents": (
        "return Program.of([(base.linears[0].name, type('Odd', (Bias,), dict(name='odd'))("
        "bias.expand(base.linears[0].out_features)))])",
        "PLUGIN_ERROR",
        "'invents' made a program that cannot be kept: InvalidAdapterError: .*unknown op 'odd'",
    ),
    "babbles": ("[os.write(f, b'rubbish\\n') for f in range(3, 1024) if babble(f)]", "PLUGIN_CRASHED", "'babbles': "),
}
# Filled by the kernel at once, which a busy machine does sooner than page by page.
LEAKS = method(
    "leaks",
    "import mmap; flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, 'MAP_POPULATE', 0); "
    "globals().setdefault('kept', []).append(mmap.mmap(-1, 1200 << 20, flags))",
)
SWELLS = method("swells", "torch.zeros(1 << 36)")
STARTS = method("starts", "subprocess.Popen(['sleep', '1000']); time.sleep(1); os._exit(0)")
BABBLE = "\nimport stat\ndef babble(f):\n    try: return stat.S_ISSOCK(os.fstat(f).st_mode)\n    except OSError: pass\n"
BAD_IMPORTS = {
    "hangs_early": ("import time; time.sleep(1000)", "its import took more than 4 s"),
    "exits_early": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "leaves_early": ("import os; os._exit(9)", "its import ended its process with exit status 9"),
    "raises_early": ("1 / 0", "ZeroDivisionError"),
    "hangs_as_method": (
        method("hangs_as_method").replace("    return MethodInfo", "    time.sleep(1000)\n    return MethodInfo"),
        "deltamux_method took more than 4 s",
    ),
    "misspelt": (method("misspelt").replace("def deltamux_parameters", "def deltamux_parmeters"), "unknown hook"),
    "mistaken": (method("mistaken").replace("(config, base)", "(config, model)"), "PluginValidationError"),
    "takes_lora": (method("takes_lora", peft_type="LORA"), "already belong to method 'lora'"),
}


@pytest.fixture(scope="module", autouse=True)
def _third_party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All the bad plugins, and a good one, are installed at once."""
    plugins = {name: source for name, (source, _) in BAD_IMPORTS.items()}
    plugins |= {name: method(name, body) + BABBLE for name, (body, _, _) in BAD_HOOKS.items()}
    plugins |= {"starts": STARTS, "leaks": LEAKS, "good": method("good", "print('hello')"), "swells": SWELLS}
    plugins["works"] = method("works", "end = time.process_time() + 0.3\n    while time.process_time() < end: pass")
    plugins["naps"] = method("naps", "time.sleep(1.5)")
    directory = install(tmp_path_factory.mktemp("third-party"), plugins)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield


@pytest.fixture(scope="module")
async def compiler() -> AsyncIterator[Compiler]:
    async with Compiler(TIMEOUT) as compiler:
        yield compiler
        last = compiler.pid
    assert last is not None
    assert not psutil.pid_exists(last)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> str:
    return encode_base(BaseModel.from_pretrained(tiny_base))


@pytest.fixture
def job(base: str, tmp_path: Path) -> Callable[[Path], Job]:
    """Returns a function that makes a job of a copy of an adapter's directory."""

    def make(adapter: Path, expected_method: str = "") -> Job:
        staged = tmp_path / f"staged-{len(list(tmp_path.iterdir()))}"
        return Job(Path(shutil.copytree(adapter, staged)), expected_method, BUDGETS, base)

    return make


def test_an_error_of_every_kind_crosses_as_it_is() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DeltamuxError)]
    assert len(kinds) > 15
    for kind in kinds:
        error = kind("what, where", reason="WHY", metadata={"tensor": "x"})
        crossed = decode_error(encode_error(error))
        assert type(crossed) is kind
        assert (crossed.code, crossed.reason, crossed.message, crossed.metadata) == (
            error.code, "WHY", "what, where", {"tensor": "x"}
        )  # fmt: skip

    class OfAPlugin(InvalidAdapterError):
        default_reason = "ODD"

    crossed = decode_error(encode_error(OfAPlugin("odd")))
    assert (type(crossed), crossed.reason) == (InvalidAdapterError, "ODD")


async def test_bad_plugins_are_left_out_by_name_and_the_others_are_there(compiler: Compiler) -> None:
    await compiler.started()
    assert set(compiler.broken) == set(BAD_IMPORTS)
    for name, (_, problem) in BAD_IMPORTS.items():
        assert problem in compiler.broken[name]
    assert {"lora", "houlsby", "prefix", "good", *BAD_HOOKS} <= set(compiler.methods)


async def test_good_adapters_are_compiled(compiler: Compiler, job: Any, loras: list[Path], tmp_path: Path) -> None:
    lora, own = job(loras[0], "lora"), job(write_adapter(tmp_path / "good", "good"))
    found = await asyncio.gather(compiler.compile(lora), compiler.compile(own))
    assert [(compiled.method, compiled.rank) for compiled in found] == [("lora", 4), ("good", 0)]
    assert Program.load(lora.staged / "program.safetensors").num_bytes() == found[0].num_bytes


@pytest.mark.parametrize("name", BAD_HOOKS)
async def test_a_bad_hook_is_refused_by_name_and_the_next_upload_is_compiled(
    name: str, compiler: Compiler, job: Any, loras: list[Path], tmp_path: Path
) -> None:
    _, reason, problem = BAD_HOOKS[name]
    with pytest.raises(PluginError, match=problem) as refused:
        await compiler.compile(job(write_adapter(tmp_path / name, name)))
    assert refused.value.reason == reason
    assert refused.value.metadata["plugin"] == name
    assert (await compiler.compile(job(loras[0]))).method == "lora"
    assert set(compiler.broken) == set(BAD_IMPORTS), "a plugin that fails an upload is not left out of the next"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells how long a process has waited for a core")
async def test_seconds_in_which_its_process_waits_for_a_core_are_not_a_plugins(
    compiler: Compiler, job: Any, tmp_path: Path
) -> None:
    await compiler.started()
    process = psutil.Process(compiler.pid)
    core = min(os.sched_getaffinity(0))
    process.cpu_affinity([core])
    os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    spin = f"import os, time; os.sched_setaffinity(0, [{core}]); end = time.time() + {TIMEOUT + 2}\n"
    command = [sys.executable, "-c", f"{spin}while time.time() < end: pass"]
    others = [await asyncio.create_subprocess_exec(*command) for _ in range(2)]
    await asyncio.sleep(0.5)
    began = time.monotonic()
    assert (await compiler.compile(job(write_adapter(tmp_path / "works", "works")))).method == "works"
    assert time.monotonic() - began > TIMEOUT, "it must have waited, or this test could not fail"
    for other in others:
        await other.wait()
    process.kill()  # the next one may use every core
    await until(lambda: compiler.pid not in (None, process.pid))
    await compiler.started()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone bounds what a process allocates")
async def test_an_adapter_that_takes_more_memory_than_one_may_is_refused_and_the_process_goes_on(
    compiler: Compiler, job: Any, tmp_path: Path
) -> None:
    await compiler.started()
    before = compiler.pid
    with pytest.raises(BudgetExceededError, match="more memory") as refused:
        await compiler.compile(job(write_adapter(tmp_path / "swells", "swells")))
    assert (refused.value.reason, refused.value.metadata["plugin"]) == ("COMPILE_MEMORY", "swells")
    assert compiler.pid == before


async def test_what_a_plugin_started_ends_with_its_process(compiler: Compiler, job: Any, tmp_path: Path) -> None:
    await compiler.started()
    process = psutil.Process(compiler.pid)
    doomed = asyncio.create_task(compiler.compile(job(write_adapter(tmp_path / "starts", "starts"))))
    await until(process.children)
    started = process.children()
    with pytest.raises(PluginError, match="'starts': deltamux_program ended its process with exit status 0"):
        await doomed
    assert psutil.wait_procs(started, timeout=10)[1] == []


async def test_a_process_whose_memory_a_plugin_keeps_is_replaced_and_its_job_is_done(
    compiler: Compiler, job: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await compiler.started()
    before = compiler.pid
    assert (await compiler.compile(job(write_adapter(tmp_path / "good", "good")))).method == "good"
    assert compiler.pid == before
    assert (await compiler.compile(job(write_adapter(tmp_path / "leaks", "leaks")))).method == "leaks"
    assert "a plugin leaks memory" in caplog.text
    await compiler.started()
    assert compiler.pid not in (before, None)
    assert before is not None
    assert not psutil.pid_exists(before)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's way to choose whom to end when memory is short")
async def test_the_process_has_the_highest_oom_score(compiler: Compiler) -> None:
    await compiler.started()
    assert compiler.pid is not None
    assert _willingness(compiler.pid) == 1000 > _willingness(os.getpid())


def _willingness(pid: int) -> int:
    """Returns Linux's OOM score adjustment of a process, at most 1000."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_an_error_of_the_files_is_no_error_of_a_plugin(
    compiler: Compiler, job: Any, loras: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidAdapterError) as refused:
        await compiler.compile(job(loras[0], "houlsby"))
    assert (refused.value.reason, refused.value.metadata) == ("METHOD_MISMATCH", {"method": "lora"})


@pytest.mark.parametrize("files", ["stay", "go"])
async def test_a_cancelled_job_leaves_the_process_to_others_and_is_no_failure_of_the_server(
    files: str, compiler: Compiler, job: Any, loras: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    await compiler.started()
    before, asked = compiler.pid, job(loras[0])
    cancelled = asyncio.create_task(compiler.compile(asked))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    if files == "go":
        shutil.rmtree(asked.staged)
    assert (await compiler.compile(job(loras[0]))).method == "lora"
    assert compiler.pid == before
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("waits", [True, False], ids=["a while after", "in the moment in which"])
async def test_a_job_is_compiled_all_the_same_where_the_process_has_ended(
    waits: bool, compiler: Compiler, job: Any, loras: list[Path]
) -> None:
    await compiler.started()
    before = compiler.pid
    psutil.Process(before).kill()
    if waits:
        await until(lambda: compiler.pid not in (before, None))
    assert (await compiler.compile(job(loras[0]))).method == "lora"


async def test_a_job_whose_process_is_killed_is_tried_again_and_no_plugin_is_blamed(
    compiler: Compiler, job: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await compiler.started()
    before = compiler.pid
    compiling = asyncio.create_task(compiler.compile(job(write_adapter(tmp_path / "naps", "naps"))))
    await asyncio.sleep(0.5)
    psutil.Process(before).kill()
    assert (await compiling).method == "naps"
    assert compiler.pid != before
    assert "'naps': deltamux_program ended its process by SIGKILL: starting another" in caplog.text


async def test_a_server_whose_compiler_does_not_start_raises_and_is_never_ready(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_process, "CHILD_MODULE", "deltamux.server.nothing")
    options = ServeOptions(model=str(tiny_base), store=tmp_path / "store", listen="127.0.0.1:0")
    with pytest.raises(UnavailableError, match="compiler process does not start"):
        async with running(options, lambda _: ReferenceEngine(tiny_base)):
            raise AssertionError("a server is ready that cannot take an upload")


async def test_uploads_are_refused_if_no_process_can_be_started(
    job: Any, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_process, "CHILD_MODULE", "deltamux.server.nothing")
    async with Compiler(TIMEOUT) as compiler:
        with pytest.raises(UnavailableError, match="does not start"):
            await compiler.compile(job(loras[0]))


ORPHANING = """
import asyncio, sys
from pathlib import Path
from deltamux.deltas import BaseModel
from deltamux.server.compiling.job import Budgets, Job, encode_base
from deltamux.server.compiling.compiler import Compiler

async def main():
    compiler = Compiler(600.0)
    await compiler.started()
    base = encode_base(BaseModel.from_pretrained(sys.argv[1]))
    job = asyncio.create_task(compiler.compile(Job(Path(sys.argv[2]), "", Budgets(1, 1, 1), base)))
    await asyncio.sleep(0.5)
    print(compiler.pid, flush=True)
    await job

asyncio.run(main())
"""


def test_the_process_ends_with_a_killed_server_even_in_a_hook_that_hangs(tiny_base: Path, tmp_path: Path) -> None:
    install(tmp_path / "site", {"spins": method("spins", "while True: pass")})
    adapter = write_adapter(tmp_path / "adapter", "spins")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{ORPHANING}"
    command = [sys.executable, "-c", code, str(tiny_base), str(adapter)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        child = psutil.Process(int(server.stdout.readline()))
        assert child.is_running()
        server.send_signal(signal.SIGKILL)
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


async def test_a_server_serves_on_while_a_hook_hangs(
    compiler: Compiler, tiny_base: Path, tmp_path: Path, loras: list[Path]
) -> None:
    serve = Servers(tiny_base, tmp_path / "store", compiler)
    async with serve() as server, server.client() as client:
        bad = write_adapter(tmp_path / "hangs", "hangs")
        upload = asyncio.create_task(client.upload_adapter("tenants/acme/adapters/bad", bad, timeout=60))
        generated = 0
        while not upload.done():
            generated += len((await client.generate("x", max_tokens=5, temperature=0.0, ignore_eos=True)).token_ids)
        with pytest.raises(PluginError, match="'hangs': deltamux_program") as refused:
            await upload
        assert refused.value.reason == "PLUGIN_TIMEOUT"
        assert generated > 50
        assert (await client.upload_adapter("tenants/acme/adapters/good", loras[0], timeout=60)).method == "lora"
        assert [adapter.name for adapter in await client.list_adapters("tenants/acme")] == [
            "tenants/acme/adapters/good"
        ]
