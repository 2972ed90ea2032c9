"""A plugin with an op of its own, installed by pip into a new environment, is served beside all others."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "plugins" / "examples" / "red"


def run(*command: object, status: int = 0, timeout: float = 300) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == status, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that sees what this one has installed, and takes what pip adds to it alone."""
    directory = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return directory


def install(environment: Path, project: Path) -> None:
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", project)


def test_the_example_keeps_every_promise_and_its_op_runs_in_the_mixed_batch(environment: Path, tmp_path: Path) -> None:
    source = tmp_path / "red"
    run("cp", "-r", EXAMPLE, source)
    install(environment, source)
    command = environment / "bin" / "python", "-m", "deltamux"
    told = run(*command, "plugin", "check", "deltamux-red", timeout=500)
    assert "ok     op edit: loads" in told
    assert "ok     red: served as trained" in told
    assert "0 broken" in told
    assert "red\tRED" in run(*command, "methods")


def test_a_new_plugin_can_be_installed_and_keeps_every_promise(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "python", "-m", "deltamux"
    told = run(*command, "plugin", "new", "my_bias", "--directory", tmp_path)
    assert "deltamux-my-bias" in told
    install(environment, tmp_path / "deltamux-my-bias")
    assert "0 broken" in run(*command, "plugin", "check", "deltamux-my-bias", "--no-engine")
    tests = tmp_path / "deltamux-my-bias" / "tests"
    run(environment / "bin" / "python", "-m", "pytest", "-q", "-k", "not served", tests)
    suite = ("-p", "deltamux.conformance.pytest_plugin", "--deltamux-methods", "my_bias")
    assert "passed" in run(environment / "bin" / "python", "-m", "pytest", "-q", *suite, "-k", "promise", tests)


@pytest.mark.parametrize(
    ("old", "new", "promise"),
    [
        ("zeros_)", "ones_)", "fresh is the identity"),
        ("* tensors", "* 0.0 * tensors", "every parameter learns"),
        ("for name in _sites(base))\n\n\ndef", "for name in _sites(base)[:1])\n\n\ndef", "files that lack a tensor"),
        ("deltamux_program(", "deltamux_programme(", "loads"),
        ("merges=True", "merges=False", "merging equals attaching"),
        ('summary="a bias behind every attention"', 'summary=""', "describes itself"),
    ],
)
def test_a_broken_promise_is_told_by_name(old: str, new: str, promise: str, environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "python", "-m", "deltamux"
    run(*command, "plugin", "new", "broken", "--directory", tmp_path)
    file = tmp_path / "deltamux-broken" / "deltamux_broken" / "method.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    install(environment, tmp_path / "deltamux-broken")
    told = run(*command, "plugin", "check", "deltamux-broken", "--no-engine", status=1)
    assert any(line.startswith("FAILED") and promise in line for line in told.splitlines()), told


def test_what_is_not_installed_or_no_plugin_is_said(environment: Path) -> None:
    command = environment / "bin" / "python", "-m", "deltamux"
    assert "is not installed" in run(*command, "plugin", "check", "deltamux-nothing", status=1)
    assert "has no entry point" in run(*command, "plugin", "check", "pluggy", status=1)
