"""`deltamux plugin`: write the beginning of a method of your own, and check methods."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("plugin", help="write and check methods of your own")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "write an installable package with a method that works, and its test"
    new = actions.add_parser("new", help=text, description=text.capitalize() + ".")
    new.add_argument("name", metavar="NAME", help="the method's name: lower-case letters, digits and _")
    new.add_argument("--directory", type=Path, default=Path(), help="where to write deltamux-NAME (default: here)")
    new.set_defaults(run=_new)
    text = "run the conformance suite against installed packages"
    check = actions.add_parser("check", help=text, description=text.capitalize() + ".")
    check.add_argument("packages", metavar="PACKAGE", nargs="+", help="name of an installed distribution")
    check.add_argument("--no-engine", action="store_true", help="leave out what needs the engine")
    check.set_defaults(run=_check, extra="methods")


def _new(arguments: argparse.Namespace) -> None:
    from deltamux.scaffold import new_plugin

    directory = new_plugin(arguments.name, arguments.directory)
    package = directory.name
    print(f"written: {directory}\nnext: pip install -e '{directory}[dev]' && deltamux plugin check {package}")


def _check(arguments: argparse.Namespace) -> int:
    from deltamux.conformance.package import check_package

    passed = failed = 0
    for package in arguments.packages:
        for outcome in check_package(package, serve=not arguments.no_engine):
            passed, failed = passed + (not outcome.problem), failed + bool(outcome.problem)
            verdict = "FAILED" if outcome.problem else "ok    "
            print(f"{verdict} {outcome.subject}: {outcome.check.replace('_', ' ')}", flush=True)
            if outcome.problem:
                print(f"       {outcome.problem}", flush=True)
    print(f"{passed} checks passed, {failed} failed")
    return 1 if failed else 0
