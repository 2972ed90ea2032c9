"""The common parts of PEFT's files of all methods."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltamux.deltas import BaseModel, Dense, LowRank
from deltamux.errors import BaseMismatchError, InvalidConfigError
from deltamux.hookspecs import Initialiser

PREFIX = "base_model.model."
"""The beginning of PEFT's tensor names, before the module's path."""

AS_PEFT = {"target_modules": None}
"""A file without target_modules has PEFT's default ones, not every projection."""

CAUSAL_LM = {"task_type": "CAUSAL_LM", "inference_mode": True}
"""The keys of adapter_config.json with which PEFT attaches it to a causal model."""


def shaped(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], base: BaseModel) -> Tensor:
    """Returns a tensor of the file, known to have a shape.

    Raises:
        BaseMismatchError: it has another: another base, or another config than the file's.
    """
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise BaseMismatchError(
            f"{name} has shape {list(tensor.shape)}; {base.architecture} and adapter_config.json need {list(shape)}",
            metadata={"tensor": name},
        )
    return tensor


def low_rank_or_dense(a: Tensor, b: Tensor, scale: float = 1.0, dropout: float = 0.0) -> LowRank | Dense:
    """Returns the change ``scale * b a`` in the form that computes less; `a` is [r, in], `b` [out, r]."""
    rank, in_features = a.shape
    if dropout or rank * (in_features + b.shape[0]) < in_features * b.shape[0]:
        return LowRank(a, b, scale, dropout)
    return Dense(scale * (b @ a))


def copy_of(base: BaseModel, name: str) -> Initialiser:
    """Returns what fills a parameter with one of the base's."""
    return lambda tensor: tensor.copy_(base.tensor(name))


def refuse_to_train(config: Any, *names: str) -> None:
    """Raises InvalidConfigError for options of PEFT's training that training here does not have."""
    for name in names:
        if getattr(config, name):
            raise InvalidConfigError(
                f"{name} is not applied in training here; leave it out (adapters that PEFT trained with it are served)",
                metadata={"field": name},
            )
