"""`deltamux data check`: what training would make of a file of data, without the base's weights."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from deltamux.cli.output import add_json, show_one
from deltamux.cli.paths import path


def add_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="look at training data").add_subparsers(metavar="COMMAND", required=True)
    check = data.add_parser(
        "check",
        help="count what training would learn, and show it",
        description="Read, render and tokenise a file as `train` does; no weights are loaded.",
    )
    check.add_argument("--model", required=True, help="directory or Hugging Face id of the base")
    check.add_argument("--data", required=True, type=path, metavar="F.jsonl")
    check.add_argument("--max-length", type=int, default=1024, help="tokens per row; more are cut (%(default)s)")
    check.add_argument("--turns", choices=("all", "last"), default="all", help="the assistant's turns that are learnt")
    check.add_argument(
        "--show", type=int, default=0, metavar="N", help="print the first N sequences, what is learnt between [[ and ]]"
    )
    add_json(check)
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import check_data

    report = check_data(
        arguments.model,
        arguments.data,
        max_length=arguments.max_length,
        turns=arguments.turns,
        show=max(0, arguments.show),
    )
    if arguments.json:
        show_one(report, as_json=True)
        return
    show_one(replace(report, examples=()), as_json=False)
    for example in report.examples:
        print(f"\n{example}")
