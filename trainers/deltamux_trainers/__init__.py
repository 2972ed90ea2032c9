"""The trainers: one loop for every method, evaluation without an engine, and merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamux_trainers.options import EvaluateOptions, TrainOptions, read_config

if TYPE_CHECKING:
    from deltamux_trainers.checking import DataReport, check_data
    from deltamux_trainers.composing import ComposeResult, compose_directories
    from deltamux_trainers.compressing import CompressResult, compress
    from deltamux_trainers.converting import convert
    from deltamux_trainers.evaluation import EvalResult, evaluate
    from deltamux_trainers.merging import MergeResult, merge
    from deltamux_trainers.training import TrainResult, train

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
    "DataReport": "checking",
    "check_data": "checking",
    "ComposeResult": "composing",
    "compose_directories": "composing",
    "CompressResult": "compressing",
    "compress": "compressing",
    "convert": "converting",
    "EvalResult": "evaluation",
    "evaluate": "evaluation",
    "MergeResult": "merging",
    "merge": "merging",
    "TrainResult": "training",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when something is trained."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
