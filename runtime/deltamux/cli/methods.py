"""`deltamux methods`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from deltamux.cli.output import add_json, show

COLUMNS = ("name", "title", "places", "merges", "peft_type", "learning_rate", "paper")


@dataclass(frozen=True)
class MethodRow:
    """One line of the table."""

    name: str
    title: str
    places: str
    merges: bool
    peft_type: str
    in_peft: bool
    learning_rate: float
    learning_rate_source: str
    paper: str


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "methods", help="list the installed methods", description="List the installed methods."
    )
    add_json(parser)
    parser.set_defaults(run=_methods)


def _methods(arguments: argparse.Namespace) -> None:
    from deltamux.registry import Registry

    registry = Registry()
    infos = [method.info for method in registry.methods()]
    rows = [
        MethodRow(
            name=info.name,
            title=info.title,
            places=info.summary,
            merges=info.merges,
            peft_type=info.peft_type,
            in_peft=info.in_peft,
            learning_rate=info.learning_rate,
            learning_rate_source=info.learning_rate_source,
            paper=info.paper,
        )
        for info in infos
    ]
    show(rows, COLUMNS, as_json=arguments.json)
    for plugin, problem in registry.broken.items():
        print(f"left out: plugin {plugin!r}: {problem}", file=sys.stderr)
