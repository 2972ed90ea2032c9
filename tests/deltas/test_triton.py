"""The Triton kernels, in Triton's interpreter and compiled for GPUs; on a machine with a GPU, run there as well.

Triton decides how kernels run when it is imported, so each way is a process of its own. What it runs are the cases of
`triton_cases.py` and `triton_slots.py`, and those of `test_batched.py` once more: whatever holds for the torch batches
holds for the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
COMPILED = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
WAYS = {
    "interpreter": {"TRITON_INTERPRET": "1"},
    **({"gpu": {"TRITON_INTERPRET": "0"}} if torch.cuda.is_available() else {}),
}
RUNS = {
    **{f"{cases} by {way}": (f"triton_{cases}.py", (), way) for cases in ("cases", "slots") for way in WAYS},
    "every case of the torch batches": ("test_batched.py", ("-p", "deltamux_testing.triton_batches"), "interpreter"),
    # Without a GPU: Triton's compiler and NVIDIA's assembler come with Triton.
    "compiled for GPUs": ("triton_compilation.py", (), "compiler"),
}
"""What the kernels pass: a file of cases, options of pytest, and a way."""


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """All runs that were asked for, two at a time: each is one process that computes in one thread."""
    asked = {item.name for item in request.session.items}
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        chosen = {name: run for name, run in RUNS.items() if f"test_the_kernels_pass[{name}]" in asked}
        yield {name: pool.submit(_run, *run, cache) for name, run in chosen.items()}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", RUNS)
def test_the_kernels_pass(runs: dict[str, Future[None]], name: str) -> None:
    runs[name].result()


def _run(cases: str, options: Sequence[str], way: str, cache: Path) -> None:
    # The interpreter's numpy warns of the very NaN that the cases put in.
    command = [sys.executable, "-m", "pytest", str(HERE / cases), "-q", "-W", "ignore::RuntimeWarning", *options]
    given = filter(None, [os.environ.get("PYTHONPATH")])
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[1] / "runtime"), *given])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **WAYS.get(way, COMPILED)}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_importing_the_deltas_and_making_a_batch_loads_no_triton() -> None:
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "from deltamux.deltas import BlockRole, LinearSite, LowRank\n"
        "from deltamux.deltas.backends.choice import module_batch\n"
        "from deltamux.deltas.backends.module_batch import PackedSlice\n"
        "site = LinearSite('l', 8, 8, True, False, 0, BlockRole.ATTENTION)\n"
        "batch = module_batch(LowRank, [PackedSlice(site, (0, 8))], 2, torch.float16, 'cpu')\n"
        "batch.set(0, {0: LowRank(*torch.ones(2, 8, 8))})\n"
        "print(*(set(sys.modules) - before))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    assert "deltamux.deltas.backends.choice" in loaded
    assert not {name for name in loaded if name.startswith(("triton", "deltamux.deltas.backends.triton"))}
