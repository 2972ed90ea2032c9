"""The trainers: one loop for every method, evaluation without an engine, and merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamux_trainers.options import EvaluateOptions, TrainOptions, read_config

if TYPE_CHECKING:
    from deltamux_trainers.tools.check import DataReport, check_data
    from deltamux_trainers.tools.compose import ComposeResult, compose_directories
    from deltamux_trainers.tools.compress import CompressResult, compress
    from deltamux_trainers.tools.convert import convert
    from deltamux_trainers.tools.evaluate import EvalResult, evaluate
    from deltamux_trainers.tools.merge import MergeResult, merge
    from deltamux_trainers.training.run import TrainResult, train

__all__ = [
    "ComposeResult",
    "CompressResult",
    "DataReport",
    "EvalResult",
    "EvaluateOptions",
    "MergeResult",
    "TrainOptions",
    "TrainResult",
    "check_data",
    "compose_directories",
    "compress",
    "convert",
    "evaluate",
    "merge",
    "read_config",
    "train",
]
_LAZY = {
    "DataReport": "tools.check",
    "check_data": "tools.check",
    "ComposeResult": "tools.compose",
    "compose_directories": "tools.compose",
    "CompressResult": "tools.compress",
    "compress": "tools.compress",
    "convert": "tools.convert",
    "EvalResult": "tools.evaluate",
    "evaluate": "tools.evaluate",
    "MergeResult": "tools.merge",
    "merge": "tools.merge",
    "TrainResult": "training.run",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when something is trained."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
