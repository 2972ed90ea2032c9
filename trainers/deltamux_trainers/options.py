"""Options of a training run and of an evaluation, checked when they are made, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from deltamux.errors import InvalidConfigError
from deltamux.options import DTYPES, Option, Range, check_declared, invalid_option

if TYPE_CHECKING:
    from deltamux.hookspecs import MethodInfo

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
"""Optimizers, by our names, and transformers' names of them."""
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau",
)  # fmt: skip
"""transformers' learning-rate schedules that need no options of their own."""
DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")
DETERMINING = (
    "method", "batch_size", "gradient_accumulation", "optimizer", "scheduler", "warmup_ratio", "weight_decay",
    "max_grad_norm", "max_length", "turns", "eval_fraction", "seed", "dtype",
)  # fmt: skip
"""Options that determine a run's losses: a run does not resume with others."""
CHANGEABLE = ("epochs", "max_steps", "eval_steps", "save_steps", "patience", "log_steps", "device", "output")
"""Options that may change when a run resumes. Its schedules follow the new number of steps."""
NARROWER_BY = 16.0
WIDER_BY = 4.0
"""Limits of the rule for learning rates, on bases narrower and wider than those that a rate was found on."""

MODEL = Option("directory or Hugging Face id of the base")
BATCH_SIZE = Range(1, 65536)
MIN_LENGTH = 2
MAX_LENGTH = Option("tokens of a sequence; longer ones are cut at the end", Range(MIN_LENGTH, 1 << 24))
TURNS = Option("the assistant's turns that are learnt", choices=("all", "last"))
DTYPE = Option("of the frozen base; adapters are float32", choices=DTYPES)
DEVICE = Option("auto (a GPU where there is one), cpu, cuda or cuda:N")
STEPS = Range(1, 1_000_000_000)


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`; the command line has the same.

    Attributes:
        data: JSONL to train on; see `deltamux_trainers.data.rows`.
        output: checkpoints go to ``checkpoints`` within it.
        config: the method's options, as in adapter_config.json.
        learning_rate: None takes the method's own default for the base; see `default_rate`.
        resume: continues from the newest intact checkpoint in `output`, exactly. All that determines the run
            (DETERMINING, the config, the data, the base, the learning rate, the number of processes) must be the same;
            CHANGEABLE may differ.
        keep_checkpoints: whether checkpoints are kept after a successful run.
        quiet: prints neither progress nor losses; callbacks get them all the same.

    Raises:
        InvalidConfigError: a value is out of range; the metadata name the field.
    """

    method: Annotated[str, Option("name of a method; `deltamux methods` lists them")]
    model: Annotated[str, MODEL]
    data: Annotated[Path, Option("rows of text, prompt+completion or messages", metavar="F.jsonl")]
    output: Annotated[Path, Option("directory of the adapter", metavar="DIR")]
    eval_data: Annotated[
        Path | None, Option("rows to evaluate on", unset="--eval-fraction of the data", metavar="F.jsonl")
    ] = None
    eval_fraction: Annotated[
        float,
        Option("share of the data to hold out, chosen by the seed, without --eval-data", Range(0.0, 1, below=True)),
    ] = 0.0
    config: Mapping[str, Any] = field(default_factory=dict)
    epochs: Annotated[float, Option("passes over the data", Range(0.0, 1e6, above=True))] = 3.0
    max_steps: Annotated[int | None, Option("optimizer steps, instead of epochs", STEPS)] = None
    batch_size: Annotated[int, Option("rows per micro-batch and process", BATCH_SIZE)] = 8
    gradient_accumulation: Annotated[int, Option("micro-batches per optimizer step", BATCH_SIZE)] = 1
    learning_rate: Annotated[
        float | None,
        Option("of the optimizer", Range(0.0, 100, above=True), unset="the method's own, for the base's width"),
    ] = None
    optimizer: Annotated[
        str,
        Option(
            "those of eight bits need bitsandbytes; a paged one moves to the host when a GPU is full",
            choices=tuple(OPTIMIZERS),
        ),
    ] = "adamw"
    scheduler: Annotated[str, Option("of the learning rate", choices=SCHEDULERS, metavar="NAME")] = "linear"
    warmup_ratio: Annotated[
        float, Option("share of the steps in which the learning rate rises", Range(0.0, 1, below=True))
    ] = 0.03
    weight_decay: Annotated[float, Option("of the optimizer", Range(0.0, 100))] = 0.0
    max_grad_norm: Annotated[float, Option("norm to which gradients are clipped", Range(0.0, 1e9))] = 1.0
    max_length: Annotated[int, MAX_LENGTH] = 1024
    turns: Annotated[str, TURNS] = "all"
    patience: Annotated[int | None, Option("evaluations without improvement after which training stops", STEPS)] = None
    eval_steps: Annotated[
        int | None, Option("optimizer steps between evaluations, each with a checkpoint", STEPS, unset="once per pass")
    ] = None
    save_steps: Annotated[
        int | None,
        Option(
            "optimizer steps between checkpoints; the last two are kept",
            STEPS,
            unset="with the evaluations, or once per pass",
        ),
    ] = None
    log_steps: Annotated[int, Option("optimizer steps between log lines", STEPS)] = 10
    seed: Annotated[int, Option("of initial values and the data's order", Range(0, 2**32 - 1))] = 0
    dtype: Annotated[str, DTYPE] = "float32"
    device: Annotated[str, DEVICE] = "auto"
    resume: Annotated[bool, Option("go on from the last whole checkpoint, exactly")] = False
    keep_checkpoints: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_declared(self)
        _check_device(self.device)
        if not isinstance(self.config, Mapping):
            raise invalid_option("config", f"is a mapping of the method's options to values, not {self.config!r}")
        for name, needs in (
            ("patience", self.patience is not None),
            ("scheduler", self.scheduler == "reduce_lr_on_plateau"),
        ):
            if needs and self.eval_data is None and not self.eval_fraction:
                raise invalid_option(
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
    """Options of `evaluate`; the command line has the same.

    Raises:
        InvalidConfigError: a value is out of range; the metadata name the field.
    """

    model: Annotated[str, MODEL]
    data: Annotated[Path, Option("rows of text, prompt+completion or messages", metavar="F.jsonl")]
    adapter: Annotated[Path | None, Option("directory of an adapter", unset="the base alone", metavar="DIR")] = None
    batch_size: Annotated[int, Option("rows per batch", BATCH_SIZE)] = 16
    max_length: Annotated[int, MAX_LENGTH] = 1024
    turns: Annotated[str, TURNS] = "all"
    max_new_tokens: Annotated[int, Option("tokens of a greedy answer", Range(1, 1 << 24))] = 64
    generate: Annotated[
        bool, Option("count exact matches of greedy answers, too; needs prompt and completion in each row")
    ] = False
    limit: Annotated[int | None, Option("rows to evaluate on", STEPS, unset="all")] = None
    dtype: Annotated[str, DTYPE] = "float32"
    device: Annotated[str, DEVICE] = "auto"

    def __post_init__(self) -> None:
        check_declared(self)
        _check_device(self.device)


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
            raise invalid_option("config", f"{file} cannot be read: {reason}") from error
        loaded = _yaml(text, f"config {file}")
        if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
            raise invalid_option("config", f"{file} is not a mapping of option names to values")
        values.update(loaded)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise invalid_option("set", f"{override!r} is not valid: write key=value")
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


def _check_device(device: str) -> None:
    if not DEVICES.fullmatch(device):
        raise invalid_option("device", f"is auto, cpu, cuda or cuda:N, not {device!r}")
