"""The output of commands: tables for people, JSON for programs."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, one document")


def show(records: Sequence[Any], columns: Sequence[str], *, as_json: bool) -> None:
    """Prints dataclasses: all fields as JSON, or the given ones as a table."""
    if as_json:
        print(json.dumps([plain(record) for record in records], indent=2))
        return
    rows = [[_cell(getattr(record, column)) for column in columns] for record in records]
    if not sys.stdout.isatty():
        for row in ([column.upper() for column in columns], *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*(column.replace("_", " ") for column in columns), box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def show_one(record: Any, *, as_json: bool) -> None:
    """Prints one dataclass, a field a line."""
    values = plain(record)
    if as_json:
        print(json.dumps(values, indent=2))
        return
    width = max(map(len, values))
    for name, value in values.items():
        if value not in (None, {}, "", ()):
            print(f"{name:{width}}  {_figure(value) if isinstance(value, float) else value}")


def plain(record: Any) -> dict[str, Any]:
    """Returns a dataclass as JSON values."""
    return {name: _plain(value) for name, value in dataclasses.asdict(record).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no other word for it
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if not isinstance(value, str | int | float | bool | dict | list | tuple | None) else value


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return _figure(value)
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
