"""deltamux: one base model, many deltas of different fine-tuning methods, served in one batch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltamux.hookspecs import hookimpl as hookimpl

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports `hookimpl` on its first use, so that a client's import of the package needs no pluggy."""
    if name != "hookimpl":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deltamux.hookspecs import hookimpl

    return hookimpl
