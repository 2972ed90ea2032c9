"""The command line as a user meets it: help, exit codes, errors, JSON; and that starting it is cheap."""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from deltamux.cli import extensions, main, parser
from deltamux.cli.output import show, show_one
from deltamux.client import AsyncClient, Client
from deltamux.conformance.bases import save_base
from deltamux.deltas import BaseModel
from deltamux.errors import FailedPreconditionError
from deltamux_testing.adapters import write_own
from deltamux_testing.server_process import ServerProcess


def commands(of: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yields the words and the parser of every command."""
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, each in action.choices.items():
                yield f"{prefix}{name}", each
                yield from commands(each, f"{prefix}{name} ")


COMMANDS = dict(commands(parser()))


def test_the_commands_are_these() -> None:
    groups = {"base", "adapter", "tenant", "store", "data", "plugin"}
    alone = "serve generate train evaluate merge compress compose demo convert methods bench"
    assert {*groups, *alone.split()} == {words for words in COMMANDS if " " not in words}
    assert groups == {words.partition(" ")[0] for words in COMMANDS if " " in words}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_a_line_of_help(command: str) -> None:
    silent = [
        action.option_strings or action.dest
        for action in COMMANDS[command]._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert not silent


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    assert left.value.code == 0
    assert f"deltamux {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["merge --output", "train --output", "data check --data", "convert"])
@pytest.mark.parametrize(("given", "problem"), [("", "is empty: give a path"), ("x" * 300, "File name too long")])
def test_a_path_that_can_be_none_is_wrong_usage(
    words: str, given: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*words.split(), given])
    assert left.value.code == 2
    assert problem in capsys.readouterr().err


def test_starting_and_help_load_no_package_but_the_projects_own() -> None:
    code = (
        "import sys; before = set(sys.modules); import deltamux.cli as c; c.parser().format_help();"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"deltamux", "deltamux_trainers"}


def test_people_read_four_digits_of_a_figure_and_programs_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Result:
        steps: int = 123456
        loss: float = 9.972919464111328

    show_one(Result(), as_json=False)
    show([Result()], ["loss"], as_json=False)
    assert capsys.readouterr().out == "steps  123456\nloss   9.973\nLOSS\n9.973\n"
    show_one(Result(), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"steps": 123456, "loss": 9.972919464111328}


def test_methods_lists_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"houlsby", "lora", "prefix"} <= {method["name"] for method in listed}


def test_methods_lists_the_trained_share_of_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_base(tmp_path, "llama")
    base = BaseModel.from_pretrained(directory)
    assert main(["methods", "--json", "--model", str(directory)]) == 0
    lora = next(m for m in json.loads(capsys.readouterr().out) if m["name"] == "lora")
    assert lora["parameters"] == sum(8 * (s.in_features + s.out_features) for s in base.linears)
    assert lora["share"] == f"{lora['parameters'] / base.num_parameters:.3%}"


def test_an_unreachable_server_is_an_error_of_one_line_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--server", "127.0.0.1:1", "--timeout", "5"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the server cannot be reached")
    assert "Traceback" not in error


def test_wrong_usage_exits_with_two() -> None:
    with pytest.raises(SystemExit) as left:
        main(["adapter", "promote", "tenants/a/adapters/b", "not-a-number"])
    assert left.value.code == 2


def test_both_clients_have_the_same_surface() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        public = {n: m for n, m in vars(kind).items() if not n.startswith("_") and inspect.isfunction(m)}
        return {name: list(inspect.signature(method).parameters) for name, method in public.items()}

    assert surface(Client) == surface(AsyncClient)


@pytest.mark.slow
def test_a_whole_session_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_base(tmp_path / "base", "llama")
    base = BaseModel.from_pretrained(directory)
    first, second = (write_own("lora", base, tmp_path / str(seed), seed=seed, r=4) for seed in (1, 2))
    server = ServerProcess(directory, tmp_path / "store")
    name = "tenants/acme/adapters/main"

    def run(*arguments: str) -> str:
        assert main([*arguments, "--server", server.address]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    try:
        assert json.loads(run("base", "show", "--json"))["architecture"] == "LlamaForCausalLM"
        assert "linear      14 sites take deltas" in run("base", "show")
        assert json.loads(run("adapter", "upload", name, str(first), "--json"))["version"] == 1
        assert "versions/2" in run("adapter", "upload", name, str(second), "--label", "run=7")
        answer = run("generate", "hello", "--adapter", name, "--max-tokens", "8", "--temperature", "0")
        assert json.loads(run("adapter", "promote", name, "2", "--json"))["serving_version"] == 2
        assert run("generate", "hello", "--adapter", name, "--max-tokens", "8", "--temperature", "0") != answer
        assert json.loads(run("adapter", "rollback", name, "--json"))["serving_version"] == 1
        shown = json.loads(run("adapter", "show", name, "--json"))
        assert [v["labels"] for v in shown["versions"]] == [{}, {"run": "7"}]
        assert name in run("adapter", "list", "acme")
        assert run("generate", "x", "--choice", "ab", "--choice", "cd", "--max-tokens", "4").strip() in ("ab", "cd")
        run("adapter", "delete", name)
        assert main(["adapter", "show", name, "--server", server.address]) == 1
        assert "NOT_FOUND" in capsys.readouterr().err
    finally:
        assert server.stop() == 0


def test_a_package_whose_commands_cannot_be_imported_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = {"broken": "no_such_module", "trainers": "deltamux_trainers.commands"}
    points = [EntryPoint(name, value, "deltamux.commands") for name, value in modules.items()]
    monkeypatch.setattr("deltamux.cli.extensions.entry_points", lambda group: points)
    listed = {words for words, _ in commands(parser())}
    assert "train" in listed
    assert "serve" not in listed
    assert "left out: commands of 'no_such_module': No module named" in capsys.readouterr().err


def test_a_package_that_is_installed_and_does_not_import_is_not_said_to_be_missing() -> None:
    """Such as torchvision for another torch, whose error transformers wraps into one that names no module."""

    def command(_: argparse.Namespace) -> int:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'GenerationMixin'") from error

    with pytest.raises(
        FailedPreconditionError, match=r"does not import: RuntimeError: operator torch.* does"
    ) as refused:
        extensions.run(argparse.Namespace(run=command, extra="serve"))
    assert refused.value.reason == "BROKEN_PACKAGE"
