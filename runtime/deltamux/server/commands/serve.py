"""`deltamux serve`."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deltamux.cli.options import add_options, given_options
from deltamux.errors import InvalidConfigError
from deltamux.server.options import ServeOptions


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("serve", help="start the server", description="Start the server.")
    add_options(parser, ServeOptions, path=Path)
    parser.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of vLLM's AsyncEngineArgs (the value is JSON); may be repeated",
    )
    parser.set_defaults(run=_serve, extra="serve")


def _serve(arguments: argparse.Namespace) -> None:
    from deltamux.server import serve

    given = given_options(arguments, ServeOptions)
    options = ServeOptions(**given, engine_arguments=_engine_arguments(arguments.engine_arg))
    for package in ("torch", "vllm"):  # before the store is made
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    serve(options)


def _engine_arguments(pairs: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidConfigError(f"--engine-arg {pair!r}: write KEY=VALUE", metadata={"field": "engine_arg"})
        try:
            values[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            values[key.replace("-", "_")] = value
    return values
