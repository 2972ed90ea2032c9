"""The `deltamux` command. Starting it is cheap: a command imports what it needs when it runs."""

import argparse
import sys
from collections.abc import Sequence

from deltamux import __version__
from deltamux.cli import adapters, base, bench, extensions, inference, methods, plugins, tenants
from deltamux.errors import DeltamuxError


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser; every command's function is in ``run``."""
    root = argparse.ArgumentParser(
        prog="deltamux", description="Serve many tenants' adapters, of different methods, on one base in one batch."
    )
    root.add_argument("--version", action="version", version=f"deltamux {__version__}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    for group in (*extensions.load(), inference, base, adapters, tenants, methods, plugins, bench):
        group.add_commands(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command: 0 when it worked, 1 when it did not, 2 for wrong usage, 130 when interrupted."""
    try:
        arguments = parser().parse_args(argv)
        status = extensions.run(arguments)
    except DeltamuxError as error:
        details = ", ".join(f"{key}={value}" for key, value in error.metadata.items())
        print(f"error: {error.message}", file=sys.stderr)
        print(f"       {error.status} {error.reason}{f' ({details})' if details else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        if str(interruption):
            print(interruption, file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return int(status or 0)
