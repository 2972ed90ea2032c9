"""Commands of other packages.

Each is a module with ``add_commands(subparsers)``. Importing it must be cheap, and must work without the
packages that its commands need: a command imports those when it runs, and names the extra that installs them as its
parser's default of ``extra``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from deltamux.errors import FailedPreconditionError

VLLM = "run `pip install 'deltamux[cuda]'` for an NVIDIA GPU; the README says how to install its CPU build"


def load() -> Iterator[Any]:
    """Yields the modules of commands."""
    import deltamux_trainers.commands as trainers  # "from" would look the name up in the package, which imports torch
    from deltamux.server import commands as server

    yield server
    yield trainers


def run(arguments: argparse.Namespace) -> int | None:
    """Runs a command.

    Raises:
        FailedPreconditionError: MISSING_EXTRA, a package that it needs is not installed.
    """
    try:
        status: int | None = arguments.run(arguments)
    except ModuleNotFoundError as error:
        extra, package = getattr(arguments, "extra", ""), (error.name or "").partition(".")[0]
        if not extra or package.startswith("deltamux"):
            raise
        how = VLLM if package == "vllm" else f"run `pip install 'deltamux[{extra}]'`"
        raise FailedPreconditionError(
            f"this command needs {package}, which is not installed: {how}",
            reason="MISSING_EXTRA",
            metadata={"extra": extra},
        ) from error
    return status
