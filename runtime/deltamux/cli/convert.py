"""`deltamux convert`: other libraries' adapters, as the server takes them."""

from __future__ import annotations

import argparse
from typing import Any

from deltamux.cli.paths import path


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn another library's adapter into one to upload",
        description="Write an adapter of AdapterHub's or MLX-LM's, or of PEFT's with adapter_model.bin, or with names "
        "that hold wrappers or the adapter's name, as one to upload.",
    )
    parser.add_argument("source", type=path, metavar="SRC", help="directory with adapter_config.json and the weights")
    parser.add_argument("destination", type=path, metavar="DEST", help="directory to write")
    parser.add_argument("--adapter-name", default="", metavar="NAME", help="which adapter, where names hold several")
    parser.add_argument("--model", default="", help="the base: the tensors' names are led to its modules")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import convert

    method = convert(
        arguments.source,
        arguments.destination,
        adapter_name=arguments.adapter_name,
        model=arguments.model,
        note=print,
    )
    print(f"{method} adapter written to {arguments.destination}")
