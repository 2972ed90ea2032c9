"""`deltamux methods`."""

import argparse
import sys
from dataclasses import dataclass
from math import prod
from typing import Any

from deltamux.cli.output import add_json, show
from deltamux.errors import InvalidConfigError

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
    learning_rate: float | None
    learning_rate_source: str
    paper: str
    parameters: int | None = None
    share: str | None = None


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "methods", help="list the installed methods", description="List the installed methods."
    )
    parser.add_argument(
        "--model",
        metavar="BASE",
        help="show how many parameters each method trains on this base (`deltamux base show`: what a server takes)",
    )
    add_json(parser)
    parser.set_defaults(run=_methods, extra="methods")


def _methods(arguments: argparse.Namespace) -> None:
    from deltamux.registry import Registry

    registry = Registry()
    base = None
    if arguments.model:
        from deltamux.deltas import BaseModel

        base = BaseModel.from_pretrained(arguments.model)
    rows = [
        MethodRow(
            name=info.name,
            title=info.title,
            places=info.summary,
            merges=info.merges,
            peft_type=info.peft_type,
            in_peft=info.in_peft,
            learning_rate=info.learning_rate if info.trains else None,
            learning_rate_source=info.learning_rate_source,
            paper=info.paper,
            **_trainable(method, base),
        )
        for method in registry.methods()
        for info in (method.info,)
    ]
    columns = (*COLUMNS[:3], "parameters", "share", *COLUMNS[3:]) if base else COLUMNS
    show(rows, columns, as_json=arguments.json)
    for plugin, problem in registry.broken.items():
        print(f"left out: plugin {plugin!r}: {problem}", file=sys.stderr)


def _trainable(method: Any, base: Any) -> dict[str, Any]:
    """Returns how many parameters a method trains on a base with its defaults, and their share of the base's.

    Empty where it trains nothing there.
    """
    if base is None or not method.info.trains:
        return {}
    try:
        declared = method.parameters(method.parse({}), base)
    except InvalidConfigError:  # the method finds nothing to train in this base, or cannot train over it
        return {}
    parameters = sum(prod(spec.shape) for spec in declared.values())
    return {"parameters": parameters, "share": f"{parameters / base.num_parameters:.3%}"}
