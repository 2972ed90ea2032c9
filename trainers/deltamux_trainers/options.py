"""Options of a training run and of an evaluation, checked when they are made: no model, no torch is needed for that."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deltamux.errors import InvalidConfigError
from deltamux.hookspecs import MethodInfo

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
"""Names of optimizers, and transformers' for them."""
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
)
"""transformers' learning-rate schedules that need no options of their own."""
DTYPES = ("float32", "bfloat16", "float16")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
MAX_STEPS = 1_000_000_000
DETERMINING = (
    "method",
    "batch_size",
    "gradient_accumulation",
    "optimizer",
    "scheduler",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "turns",
    "eval_fraction",
    "seed",
    "dtype",
)
"""Options that a run's losses follow from: going on with others is refused."""
CHANGEABLE = ("epochs", "max_steps", "eval_steps", "save_steps", "patience", "log_steps", "device", "output")
"""Options that may change when a run goes on. Its schedules follow the new number of steps."""
TURNS = ("all", "last")
NARROWER_BY = 16.0
WIDER_BY = 4.0
"""How far the rule for learning rates is trusted, on bases narrower and wider than those a rate was found on."""


class Range(NamedTuple):
    """Values that a number may have, both bounds included, unless `above` or `below` excludes one."""

    least: float
    most: float
    above: bool = False
    below: bool = False
    whole: bool = True

    def check(self, name: str, value: object) -> None:
        """Raises InvalidConfigError, naming the option, where a value is not a number in the range."""
        if isinstance(value, int if self.whole else int | float) and not isinstance(value, bool):
            outside = value <= self.least if self.above else value < self.least
            beyond = value >= self.most if self.below else value > self.most
            if not (outside or beyond or value != value):  # a NaN is in no range, and differs from itself
                return
        kind = "a whole number" if self.whole else "a number"
        least = f"above {self.least:g}" if self.above else f"of at least {self.least:g}"
        most = f"below {self.most:g}" if self.below else f"at most {self.most:g}"
        raise _invalid(name, f"is {kind} {least} and {most}, not {value!r}")


TRAIN_RANGES = {
    "epochs": Range(0, 1e6, above=True, whole=False),
    "max_steps": Range(1, MAX_STEPS),
    "batch_size": Range(1, 65536),
    "gradient_accumulation": Range(1, 65536),
    "learning_rate": Range(0, 100, above=True, whole=False),
    "warmup_ratio": Range(0, 1, below=True, whole=False),
    "weight_decay": Range(0, 100, whole=False),
    "max_grad_norm": Range(0, 1e9, whole=False),
    "max_length": Range(2, 1 << 24),
    "eval_fraction": Range(0, 1, below=True, whole=False),
    "eval_steps": Range(1, MAX_STEPS),
    "patience": Range(1, MAX_STEPS),
    "save_steps": Range(1, MAX_STEPS),
    "log_steps": Range(1, MAX_STEPS),
    "seed": Range(0, 2**32 - 1),
}
EVALUATE_RANGES = {
    "batch_size": Range(1, 65536),
    "max_length": Range(2, 1 << 24),
    "max_new_tokens": Range(1, 1 << 24),
    "limit": Range(1, MAX_STEPS),
}


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`; the command line's flags have these names. `TRAIN_RANGES` bounds the numbers.

    Attributes:
        method: a registered method's name.
        model: directory or Hugging Face id of the base.
        data: JSONL to train on; see `deltamux_trainers.data.files`.
        output: directory of the adapter; checkpoints go to ``checkpoints`` within it.
        eval_data: JSONL to evaluate on; None takes `eval_fraction` of the data, chosen by the seed.
        max_length: tokens of a sequence; longer ones are cut at the end.
        turns: which of the assistant's turns of a conversation are learnt: ``all``, or the ``last`` alone.
        config: the method's options, as in adapter_config.json.
        max_steps: optimizer steps; None runs `epochs` passes over the data.
        learning_rate: None takes the method's own default for the base; see `default_rate`.
        optimizer: adamw; or, of bitsandbytes, adamw_8bit (its states in eight bits) or paged_adamw_8bit (on a GPU, its
            states move to the host's memory when the GPU's runs short).
        scheduler: of the learning rate; one of SCHEDULERS.
        warmup_ratio: share of the steps in which the learning rate rises, below 1.
        patience: evaluations without improvement after which training stops; None never stops early.
        batch_size: rows per micro-batch and process.
        eval_steps: optimizer steps between evaluations, each with a checkpoint; None does both once per pass.
        save_steps: optimizer steps between checkpoints, the last two of which are kept; None saves only once per pass,
            or with the evaluations.
        resume: goes on from the newest whole checkpoint in `output`, exactly. What determines the run (DETERMINING, the
            config, the data, the base, the learning rate, the number of processes) is what it was; CHANGEABLE may
            differ.
        dtype: of the frozen base, one of DTYPES; the adapter trains in float32.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
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
    turns: str = "all"
    patience: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    log_steps: int = 10
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    resume: bool = False
    keep_checkpoints: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        _check_ranges(self, TRAIN_RANGES)
        _check_place(self)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("scheduler", self.scheduler, SCHEDULERS)
        _check_choice("turns", self.turns, TURNS)
        if not isinstance(self.config, Mapping):
            raise _invalid("config", f"is a mapping of the method's options to values, not {self.config!r}")
        for name, needs in (
            ("patience", self.patience is not None),
            ("scheduler", self.scheduler == "reduce_lr_on_plateau"),
        ):
            if needs and self.eval_data is None and not self.eval_fraction:
                raise _invalid(
                    name, f"{getattr(self, name)} needs data to evaluate on: give eval_data or eval_fraction"
                )

    def rate(self, info: MethodInfo, hidden_size: int) -> float:
        """Returns the learning rate asked for, or the method's default for a base of a width."""
        return default_rate(info, hidden_size) if self.learning_rate is None else self.learning_rate


def default_rate(info: MethodInfo, hidden_size: int) -> float:
    """Returns a method's learning rate for a base of a width.

    Adam's best rate for a matrix goes with one over its width (muP: Yang et al. 2022,
    https://arxiv.org/abs/2203.03466), that for a vector does not depend on it. So the rate of a method that trains
    matrices, found on bases of `learning_rate_width`, is multiplied by that width over the present one, within
    NARROWER_BY and WIDER_BY.
    """
    if info.learning_rate_width is None:
        return info.learning_rate
    return info.learning_rate * min(NARROWER_BY, max(1 / WIDER_BY, info.learning_rate_width / hidden_size))


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`. `EVALUATE_RANGES` bounds the numbers.

    Attributes:
        adapter: directory of an adapter; None evaluates the base alone.
        generate: whether to answer each prompt greedily and count exact matches (``prompt`` and ``completion`` data).
        max_length: tokens of a sequence; longer ones are cut at the end.
        turns: which of the assistant's turns of a conversation are looked at: ``all``, or the ``last`` alone.
        limit: rows to look at; None takes all.
    """

    model: str
    data: Path
    adapter: Path | None = None
    batch_size: int = 16
    max_length: int = 1024
    turns: str = "all"
    max_new_tokens: int = 64
    generate: bool = False
    limit: int | None = None
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        _check_ranges(self, EVALUATE_RANGES)
        _check_place(self)
        _check_choice("turns", self.turns, TURNS)


def read_config(file: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a method's options from a YAML file and ``key=value`` overrides (values are YAML, too).

    Raises:
        InvalidConfigError: the file cannot be read, is not valid YAML (with its line) or not a mapping; or an override
            is not ``key=value``.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise _invalid("config", f"{file} cannot be read: {reason}") from error
        loaded = _yaml(text, f"config {file}")
        if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
            raise _invalid("config", f"{file} is not a mapping of option names to values")
        values.update(loaded)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise _invalid("set", f"{override!r} is not valid: write key=value")
        values[key.strip()] = _yaml(value, f"set {override!r}")
    return values


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise InvalidConfigError(f"{where} is not valid YAML{line}: {problem}", metadata={"field": "config"}) from error


def _check_ranges(options: object, ranges: Mapping[str, Range]) -> None:
    """Checks numbers; None is one that was not given, where it is the default."""
    for name, allowed in ranges.items():
        value = getattr(options, name)
        if value is not None or getattr(type(options), name) is not None:
            allowed.check(name, value)


def _check_place(options: TrainOptions | EvaluateOptions) -> None:
    _check_choice("dtype", options.dtype, DTYPES)
    if not DEVICE.fullmatch(options.device):
        raise _invalid("device", f"is auto, cpu, cuda or cuda:N, not {options.device!r}")


def _check_choice(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise _invalid(name, f"is one of {', '.join(known)}, not {value!r}")


def _invalid(name: str, problem: str) -> InvalidConfigError:
    return InvalidConfigError(f"{name} {problem}", metadata={"field": name})
