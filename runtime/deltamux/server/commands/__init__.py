"""Commands of the server's machine: `deltamux serve` and `deltamux store`. Importing them does not import torch."""

from typing import Any

from deltamux.server.commands import serve, store


def add_commands(commands: Any) -> None:
    serve.add_commands(commands)
    store.add_commands(commands)
