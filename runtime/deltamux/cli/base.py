"""`deltamux base`: the base model of a server, and what it takes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from deltamux.cli.connect import add_connection, connect
from deltamux.cli.output import add_json, show_one

if TYPE_CHECKING:
    from deltamux.client import Base


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("base", help="show a server's base model, and what it takes")
    group = parser.add_subparsers(metavar="COMMAND", required=True)
    show = group.add_parser("show", help="show the base model", description="Show the base model, and what it takes.")
    add_json(show)
    add_connection(show)
    show.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        base = client.get_base()
    if arguments.json:
        show_one(base, as_json=True)
    else:
        _print(base)


def _print(base: Base) -> None:
    print(f"{base.architecture}, {base.num_parameters:,} parameters, fingerprint {base.fingerprint}")
    print(f"{base.dtype}: {base.dtype_reason}")
    print(f"sequences of {base.max_model_len} tokens at most")
    for site in base.sites:
        print(f"{site.kind:10}  {site.num_supported} sites take deltas")
        for name, reason in site.refused.items():
            print(f"{'':10}  {name}: {reason}")
        if (others := site.num_refused - len(site.refused)) > 0:
            print(f"{'':10}  and {others} others take none")
    print(f"{'methods':10}  {', '.join(name for name, refusal in base.methods.items() if not refusal)}")
    for name, refusal in base.methods.items():
        if refusal:
            print(f"{'':10}  not {name}: {refusal}")
