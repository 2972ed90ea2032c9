"""The Triton kernels, in Triton's interpreter and compiled for GPUs; on a machine with a GPU, run there as well.

Triton decides how kernels run when it is imported, so each way is a process of its own. What it runs are the cases of
`triton_cases.py` and `triton_life.py`, and those of `test_batched.py` once more: whatever holds for the torch batches
holds for the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WAYS = {"interpreter": "1", **({"gpu": "0"} if torch.cuda.is_available() else {})}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cases", ["triton_cases.py", "triton_life.py"])
def test_the_kernels_pass_every_case(cases: str, way: str) -> None:
    _run(cases, TRITON_INTERPRET=WAYS[way])


@needs_triton
def test_the_kernels_pass_every_case_of_the_torch_batches() -> None:
    _run("test_batched.py", "-p", "deltas.triton_batches", TRITON_INTERPRET="1")


@needs_triton
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Without one: Triton's compiler and NVIDIA's assembler come with Triton."""
    _run("triton_compilation.py", TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1", TRITON_CACHE_DIR=str(tmp_path))


def _run(cases: str, *options: str, **variables: str) -> None:
    # The interpreter's numpy warns of the very NaN that the cases put in.
    command = [sys.executable, "-m", "pytest", str(HERE / cases), "-q", "-W", "ignore::RuntimeWarning", *options]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[1] / "runtime")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_importing_the_deltas_and_making_a_batch_loads_no_triton() -> None:
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "from deltamux.deltas import BlockRole, LinearSite, LowRank\n"
        "from deltamux.deltas.batches import module_batch\n"
        "from deltamux.deltas.ops.batched import Part\n"
        "site = LinearSite('l', 8, 8, True, False, 0, BlockRole.ATTENTION)\n"
        "batch = module_batch(LowRank, [Part(site, (0, 8))], 2, torch.float16, 'cpu')\n"
        "batch.place(0, 0, LowRank(*torch.ones(2, 8, 8)))\n"
        "print(*(set(sys.modules) - before))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    assert "deltamux.deltas.kernels.triton" in loaded
    assert not {name for name in loaded if name.startswith(("triton", "deltamux.deltas.kernels.triton."))}
