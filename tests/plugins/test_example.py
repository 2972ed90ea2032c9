"""A plugin with an op of its own, installed by pip into a new environment, is served next to all others."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from deltamux.cli import main
from deltamux.scaffold import new_plugin

pytestmark = pytest.mark.slow

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


def install(environment: Path, *projects: Path) -> None:
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", *projects)


def test_the_example_passes_every_check_and_its_op_runs_in_the_mixed_batch(environment: Path, tmp_path: Path) -> None:
    source = tmp_path / "red"
    run("cp", "-r", EXAMPLE, source)
    install(environment, source)
    command = environment / "bin" / "python", "-m", "deltamux"
    output = run(*command, "plugin", "check", "deltamux-red", timeout=500)
    assert "ok     op edit: loads" in output
    assert "ok     red: served as trained" in output
    assert "0 failed" in output
    assert "red\tRED" in run(*command, "methods")


def test_a_new_plugin_can_be_installed_and_passes_its_own_tests(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "python", "-m", "deltamux"
    output = run(*command, "plugin", "new", "my_bias", "--directory", tmp_path)
    assert "deltamux-my-bias" in output
    install(environment, tmp_path / "deltamux-my-bias")
    tests = tmp_path / "deltamux-my-bias" / "tests"
    suite = ("-p", "deltamux.conformance.pytest_plugin", "--deltamux-methods", "my_bias")
    assert "passed" in run(environment / "bin" / "python", "-m", "pytest", "-q", *suite, "-k", "not served", tests)


BROKEN = {
    "fresh is the identity": ("zeros_)", "ones_)"),
    "every parameter learns": ("* tensors", "* 0.0 * tensors"),
    "files that lack a tensor": ("for name in _sites(base))\n\n\ndef", "for name in _sites(base)[:1])\n\n\ndef"),
    "loads": ("deltamux_program(", "deltamux_programme("),
    "merging equals attaching": ("merges=True", "merges=False"),
    "describes itself": ('summary="a bias after every attention"', 'summary=""'),
}
"""A check, and the edit of a new plugin's source with which it fails."""


@pytest.fixture(scope="module")
def verdicts(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one check says of a new plugin as it is written, ``sound``, and of one for every way to break it."""
    directory = tmp_path_factory.mktemp("broken")
    projects = [new_plugin(name, directory) for name in ("sound", *map(_name, range(len(BROKEN))))]
    for project, (old, new) in zip(projects[1:], BROKEN.values(), strict=True):
        (file,) = project.glob("deltamux_*/method.py")
        source = file.read_text()
        assert old in source
        file.write_text(source.replace(old, new))
    install(environment, *projects)
    check = environment / "bin" / "python", "-m", "deltamux", "plugin", "check"
    return run(*check, *(project.name for project in projects), "--no-engine", status=1).splitlines()


def _name(number: int) -> str:
    return f"broken{number}"


def test_a_new_plugin_passes_every_check(verdicts: list[str]) -> None:
    own = [line for line in verdicts if re.search(r"\bsound:", line)]
    assert own
    assert all(line.startswith("ok") for line in own), own


@pytest.mark.parametrize("check", BROKEN)
def test_a_failed_check_is_named(check: str, verdicts: list[str]) -> None:
    name = _name(list(BROKEN).index(check))
    own = [line for line in verdicts if re.search(rf"\b{name}:", line)]
    assert any(line.startswith("FAILED") and check in line for line in own), own


@pytest.mark.parametrize(("package", "message"), [("deltamux-nothing", "not installed"), ("pluggy", "no entry point")])
def test_what_is_not_installed_or_no_plugin_is_reported(
    package: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugin", "check", package]) == 1
    assert message in capsys.readouterr().err
