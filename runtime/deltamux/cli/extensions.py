"""Commands that other packages register, under the entry point group ``deltamux.commands``.

An entry point is a module with ``add_commands(subparsers)``. Importing it must be cheap, and must work without the
packages that its commands need: a command imports those when it runs, and names the extra that installs them as its
parser's default of ``extra``.
"""

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from deltamux.errors import FailedPreconditionError

ENTRY_POINT_GROUP = "deltamux.commands"
VLLM = "run `pip install 'deltamux[cuda]'` for an NVIDIA GPU; the README says how to install its CPU build"


def load() -> Iterator[Any]:
    """Yields the registered modules, by name; one that cannot be imported is left out, with a line on stderr."""
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    if not points:
        print("some commands are missing: install deltamux anew, which registers them", file=sys.stderr)
    for point in points:
        try:
            yield point.load()
        except Exception as error:  # another package's code
            print(f"left out: commands of {point.value!r}: {error}", file=sys.stderr)


def run(arguments: argparse.Namespace) -> int | None:
    """Runs a command.

    Raises:
        FailedPreconditionError: MISSING_EXTRA, a package that it needs is not installed; BROKEN_PACKAGE, one is, and
            does not import.
    """
    try:
        status: int | None = arguments.run(arguments)
    except ModuleNotFoundError as error:
        extra, package = getattr(arguments, "extra", ""), (error.name or "").partition(".")[0]
        if not extra or package.startswith("deltamux"):
            raise
        if not package:
            raise _broken(error) from error
        how = VLLM if package == "vllm" else f"run `pip install 'deltamux[{extra}]'`"
        raise FailedPreconditionError(
            f"this command needs {package}, which is not installed: {how}",
            reason="MISSING_EXTRA",
            metadata={"extra": extra},
        ) from error
    return status


def _broken(error: BaseException) -> FailedPreconditionError:
    """Returns the refusal where transformers wraps what a package raised as it was imported."""
    while error.__cause__ is not None:
        error = error.__cause__
    return FailedPreconditionError(
        f"a package that this command needs is installed, but does not import: {type(error).__name__}: {error}. Where "
        "it is built for another torch (such as torchvision), install its build for this one, or uninstall it",
        reason="BROKEN_PACKAGE",
    )
