"""The connection of commands to a server."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamux.errors import InvalidArgumentError
from deltamux.options import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from deltamux.client import Client


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a command that talks to a server."""
    group = parser.add_argument_group("server")
    add_address(
        group,
        default=os.environ.get("DELTAMUX_SERVER", DEFAULT_ADDRESS),
        help="host:port or unix:path (environment: DELTAMUX_SERVER; default: %(default)s)",
    )
    add_credentials(group)


def add_address(group: argparse._ActionsContainer, *, help: str, default: str | None = None) -> None:
    group.add_argument("--server", "--address", dest="server", default=default, metavar="ADDRESS", help=help)


def add_credentials(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-key", default=os.environ.get("DELTAMUX_API_KEY"), metavar="KEY", help="environment: DELTAMUX_API_KEY"
    )
    group.add_argument("--tls", action="store_true", help="connect with TLS")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM file of the authority to trust")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline of each call")


def connect(arguments: argparse.Namespace) -> Client:
    from deltamux.client import Client

    return Client(arguments.server, **credentials(arguments))


def credentials(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of either client."""
    tls: bool | bytes = _authority(arguments.tls_ca) if arguments.tls_ca else arguments.tls
    return {"api_key": arguments.api_key, "tls": tls, "timeout": arguments.timeout}


def _authority(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(
            f"--tls-ca {file} cannot be read: {error.strerror}", reason="TLS_FILES", metadata={"file": str(file)}
        ) from None
