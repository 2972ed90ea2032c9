"""Declared options as arguments of the command line."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from deltamux.cli.paths import path
from deltamux.options import Declared, declared


def add_options(
    parser: argparse._ActionsContainer, options: type, names: Iterable[str] = (), *, path: Callable[[str], Path] = path
) -> None:
    """Adds the declared options of a dataclass, or those of some names: what is required comes first.

    Args:
        path: makes a path of an argument; by default one that refuses what cannot be a path.
    """
    known = declared(options)
    chosen = {name: known[name] for name in names or known}
    for name, each in sorted(chosen.items(), key=lambda item: item[1].default is not dataclasses.MISSING):
        _add_option(parser, name, each, path if each.kind is Path else each.kind)


def given_options(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """Returns the values of a dataclass's options that the command has, by name."""
    return {name: getattr(arguments, name) for name in declared(options) if hasattr(arguments, name)}


def _add_option(parser: argparse._ActionsContainer, name: str, declared: Declared, read: Callable[[str], Any]) -> None:
    option, kind, default = declared
    # What is on by default has a flag that turns it off.
    off = kind is bool and default is True
    flags = [f"--{'no-' if off else ''}{each.replace('_', '-')}" for each in (name, *option.aliases)]
    if kind is bool:
        parser.add_argument(*flags, dest=name, action="store_false" if off else "store_true", help=option.help)
        return
    required = default is dataclasses.MISSING
    words = "{" + ",".join(option.choices) + "}" if option.choices else None
    shown = "" if required else option.unset if default is None else default
    notes = [f"default: {shown}"] if shown != "" else []
    notes += [option.allowed.bounds] if option.allowed else []
    notes += [f"one of {', '.join(option.choices)}"] if option.choices and option.metavar else []
    parser.add_argument(
        *flags,
        dest=name,
        required=required,
        default=None if required else default,
        type=read,
        metavar=option.metavar or words,
        help=option.help + (f" ({'; '.join(notes)})" if notes else ""),
    )
