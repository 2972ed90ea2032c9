"""Training of any method, and tools for adapters and data: evaluate, merge, compress, compose, convert, check data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltamux_trainers.api import *  # noqa: F403  # the public names, for type checkers
else:

    def __getattr__(name: str) -> Any:
        """Returns a name of `deltamux_trainers.api`, whose import takes seconds (torch, transformers)."""
        from importlib import import_module

        return getattr(import_module("deltamux_trainers.api"), name)
