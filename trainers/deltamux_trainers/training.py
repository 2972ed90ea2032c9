"""The one training loop: transformers' Trainer around a `DeltaModel`, for any method."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from deltamux.deltas import BaseModel
from deltamux.errors import FailedPreconditionError, InvalidConfigError
from deltamux.registry import Registry
from deltamux_trainers.data import Encoded, collate, encode, read_rows
from deltamux_trainers.model import DeltaModel
from deltamux_trainers.options import OPTIMIZERS, TrainOptions

PARAMETERS_FILE = "parameters.safetensors"
SCHEDULE_FILE = "schedule.safetensors"
REPORT_FILE = "train_report.json"


@dataclass(frozen=True)
class TrainResult:
    """What a run did; also written to ``train_report.json`` beside the adapter.

    Attributes:
        loss: mean loss over the training run.
        eval_loss: of the parameters that were kept; None without evaluation data.
        learning_rate: the highest of the run's schedule: the one asked for, or the method's default for this base.
        share: trainable parameters divided by the base's.
        seconds: of the training loop.
    """

    output: Path
    method: str
    steps: int
    loss: float
    eval_loss: float | None
    parameters: int
    share: float
    seconds: float
    learning_rate: float


class LoadedBase(NamedTuple):
    model: nn.Module
    tokenizer: Any
    base: BaseModel


def load_base(model: str, dtype: str, device: str) -> LoadedBase:
    """Loads a base model and its tokenizer, and describes it (with its fingerprint)."""
    base = BaseModel.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return LoadedBase(loaded.to(pick_device(device)), AutoTokenizer.from_pretrained(model), base)


def pick_device(device: str) -> str:
    return device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def train(options: TrainOptions, *callbacks: TrainerCallback) -> TrainResult:
    """Trains an adapter and writes it to `options.output`, whole or not at all.

    Args:
        callbacks: transformers' callbacks, for those who want to watch.
    Raises:
        InvalidConfigError, InvalidArgumentError: an option or a row of the data is wrong.
        FailedPreconditionError: the output holds an adapter already, or there is nothing to resume from.
    """
    method = Registry().get(options.method)
    config = method.parse(options.config)
    _check_output(options)
    set_seed(options.seed)
    loaded = load_base(options.model, options.dtype, options.device)
    rows, eval_rows = _datasets(options, loaded.tokenizer)
    rate = options.rate(method.info, loaded.base.dims.hidden_size)
    model = DeltaModel(loaded.model, loaded.base, method, config, options.seed)
    trainer = _DeltaTrainer(
        model=model,
        args=_arguments(options, rate, bool(eval_rows)),
        train_dataset=rows,
        eval_dataset=eval_rows or None,
        data_collator=lambda batch: collate(batch, loaded.tokenizer.pad_token_id or 0),
        callbacks=[*_callbacks(options), *callbacks],
    )
    trainer.add_callback(_Scheduled(trainer))
    if options.quiet:
        trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    outcome = trainer.train(resume_from_checkpoint=options.resume)
    result = TrainResult(
        output=options.output,
        method=method.name,
        steps=outcome.global_step,
        loss=outcome.training_loss,
        eval_loss=trainer.evaluate()["eval_loss"] if eval_rows else None,
        parameters=sum(p.numel() for p in model.deltas),
        share=model.share(),
        seconds=time.monotonic() - started,
        learning_rate=rate,
    )
    with torch.no_grad():
        written, tensors = model.schedule.finish(config, model.exported())
        checkpoint = method.checkpoint(written, loaded.base, tensors)
    _write(checkpoint.write, options, result)
    return result


class _DeltaTrainer(Trainer):
    """Checkpoints hold the method's parameters, never the base."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        _save(self.delta_model.parameters_by_name(), directory / PARAMETERS_FILE)
        _save(self.delta_model.schedule.state, directory / SCHEDULE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        self.delta_model.load_parameters(load_file(directory / PARAMETERS_FILE))
        self.delta_model.schedule.state = load_file(directory / SCHEDULE_FILE)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    @property
    def delta_model(self) -> DeltaModel:
        assert isinstance(self.model, DeltaModel)
        return self.model


class _Scheduled(TrainerCallback):
    """Lets the method's schedule take part in every update."""

    def __init__(self, trainer: _DeltaTrainer) -> None:
        self._model = trainer.delta_model

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept = self._model.schedule.state
        self._model.begin(state.max_steps)
        self._model.schedule.state = {**self._model.schedule.state, **kept}

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        frozen = self._model.schedule.frozen(state.global_step)
        for name, parameter in self._model.parameters_by_name().items():
            parameter.requires_grad_(name not in frozen)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._model.schedule.after_update(state.global_step + 1, self._model.parameters_by_name())


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _arguments(options: TrainOptions, learning_rate: float, evaluates: bool) -> TrainingArguments:
    strategy = "epoch" if options.eval_steps is None else "steps"
    return TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=learning_rate,
        optim=OPTIMIZERS[options.optimizer],
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup_ratio,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        eval_strategy=strategy if evaluates else "no",
        save_strategy=strategy,
        eval_steps=options.eval_steps,
        save_steps=options.eval_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=evaluates,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        logging_steps=options.log_steps,
        disable_tqdm=options.quiet or not sys.stderr.isatty(),
        report_to="none",
        use_cpu=pick_device(options.device) == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        seed=options.seed,
        data_seed=options.seed,
    )


def _callbacks(options: TrainOptions) -> list[TrainerCallback]:
    return [] if options.patience is None else [EarlyStoppingCallback(options.patience)]


def _datasets(options: TrainOptions, tokenizer: Any) -> tuple[list[Encoded], list[Encoded]]:
    rows = [encode(row, tokenizer, options.max_length) for row in read_rows(options.data, tokenizer)]
    if options.eval_data is not None:
        held_out = read_rows(options.eval_data, tokenizer)
        return rows, [encode(row, tokenizer, options.max_length) for row in held_out]
    size = int(len(rows) * options.eval_fraction)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    shuffled = [rows[i] for i in order]
    return shuffled[size:], shuffled[:size]


def _check_output(options: TrainOptions) -> None:
    if (options.output / "adapter_config.json").exists():
        raise FailedPreconditionError(
            f"{options.output} holds an adapter already: choose another output, or remove it", reason="OUTPUT_EXISTS"
        )
    checkpoints = list((options.output / "checkpoints").glob("checkpoint-*"))
    if options.resume and not checkpoints:
        raise FailedPreconditionError(f"{options.output} has no checkpoint to resume from", reason="NO_CHECKPOINT")
    if checkpoints and not options.resume:
        raise InvalidConfigError(
            f"{options.output} holds checkpoints of an unfinished run: resume it, or choose another output",
            metadata={"field": "resume"},
        )


def _write(write: Any, options: TrainOptions, result: TrainResult) -> None:
    """Writes the adapter's files beside and renames them in, the config last: an adapter is whole when it has one."""
    staging = options.output / "writing"
    write(staging)
    report = {**asdict(result), "output": str(result.output), "options": _plain(asdict(replace(options)))}
    (staging / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    for name in (REPORT_FILE, "adapter_model.safetensors", "adapter_config.json"):
        (staging / name).rename(options.output / name)
    staging.rmdir()
    if not options.keep_checkpoints:
        shutil.rmtree(options.output / "checkpoints", ignore_errors=True)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
