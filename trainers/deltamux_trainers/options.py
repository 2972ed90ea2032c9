"""What a training run, an evaluation or a merge is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamux.errors import InvalidConfigError
from deltamux.hookspecs import MethodInfo

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
"""Names of optimizers, and transformers' for them."""
NARROWER_BY = 16.0
WIDER_BY = 4.0
"""How far the rule for learning rates is trusted, on bases narrower and wider than those a rate was found on."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`; the command line's flags have these names.

    Attributes:
        method: a registered method's name.
        model: directory or Hugging Face id of the base.
        data: JSONL to train on; see `deltamux_trainers.data`.
        output: directory of the adapter; checkpoints go to ``checkpoints`` within it.
        eval_data: JSONL to evaluate on; None takes `eval_fraction` of the data, chosen by the seed.
        config: the method's options, as in adapter_config.json.
        max_steps: optimizer steps; None runs `epochs` passes over the data.
        learning_rate: None takes the method's own default for the base; see `default_rate`.
        optimizer: adamw; or, of bitsandbytes, adamw_8bit (its states in eight bits) or paged_adamw_8bit (on a GPU, its
            states move to the host's memory when the GPU's runs short).
        patience: evaluations without improvement after which training stops; None never stops early.
        eval_steps: optimizer steps between evaluations and checkpoints; None does both once a pass.
        resume: goes on from the last checkpoint in `output`, exactly.
        dtype: of the frozen base; the adapter trains in float32.
        keep_checkpoints: whether checkpoints stay after training has ended well.
        quiet: prints neither progress nor losses; callbacks still learn of them.
    """

    method: str
    model: str
    data: Path
    output: Path
    eval_data: Path | None = None
    eval_fraction: float = 0.0
    config: Mapping[str, Any] = field(default_factory=dict)
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    optimizer: str = "adamw"
    scheduler: str = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    patience: int | None = None
    eval_steps: int | None = None
    log_steps: int = 10
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    resume: bool = False
    keep_checkpoints: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.eval_fraction < 1.0:
            raise _invalid("eval_fraction", f"is at least 0 and below 1, not {self.eval_fraction}")
        for name in ("batch_size", "gradient_accumulation", "max_length", "log_steps"):
            if getattr(self, name) < 1:
                raise _invalid(name, f"is at least 1, not {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise _invalid("optimizer", f"is one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if self.patience is not None and self.eval_data is None and not self.eval_fraction:
            raise _invalid("patience", "needs data to evaluate on: give eval_data or eval_fraction")

    def rate(self, info: MethodInfo, hidden_size: int) -> float:
        """Returns the learning rate asked for, or the method's default for a base of a width."""
        return default_rate(info, hidden_size) if self.learning_rate is None else self.learning_rate


def default_rate(info: MethodInfo, hidden_size: int) -> float:
    """Returns a method's learning rate for a base of a width.

    Adam's best rate for a matrix goes with one over its width (muP: Yang et al. 2022, https://arxiv.org/abs/2203.03466),
    that for a vector does not depend on it. So the rate of a method that trains matrices, found on bases of
    `learning_rate_width`, is multiplied by that width over the present one, within NARROWER_BY and WIDER_BY.
    """
    if info.learning_rate_width is None:
        return info.learning_rate
    return info.learning_rate * min(NARROWER_BY, max(1 / WIDER_BY, info.learning_rate_width / hidden_size))


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`.

    Attributes:
        adapter: directory of an adapter; None evaluates the base alone.
        generate: whether to answer each prompt greedily and count exact matches (``prompt`` and ``completion`` data).
        limit: rows to look at; None takes all.
    """

    model: str
    data: Path
    adapter: Path | None = None
    batch_size: int = 16
    max_length: int = 1024
    max_new_tokens: int = 64
    generate: bool = False
    limit: int | None = None
    dtype: str = "float32"
    device: str = "auto"


def read_config(file: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a method's options from a YAML file and ``key=value`` overrides (values are YAML, too).

    Raises:
        InvalidConfigError: the file is no mapping, or an override has no ``=``.
    """
    import yaml

    values: dict[str, Any] = {}
    if file is not None:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise InvalidConfigError(f"{file} holds no mapping of options to values")
        values.update(loaded)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InvalidConfigError(f"--set {override!r}: write key=value", metadata={"field": key})
        values[key.strip()] = yaml.safe_load(value)
    return values


def _invalid(name: str, problem: str) -> InvalidConfigError:
    return InvalidConfigError(f"{name} {problem}", metadata={"field": name})
