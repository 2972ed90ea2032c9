"""A training run, for any method: from its options to the adapter's files."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from deltamux.adapter_files import CONFIG_FILE, TENSORS_FILE
from deltamux.deltas import BaseModel, Checkpoint
from deltamux.errors import FailedPreconditionError, InvalidConfigError
from deltamux.registry import Method, Registry
from deltamux_trainers.data.collator import DataCollator
from deltamux_trainers.data.dataset import load_dataset
from deltamux_trainers.data.tokenization import RowTokenizer, TokenizedSequence
from deltamux_trainers.loading import describe_base, load_model, load_tokenizer, pick_device
from deltamux_trainers.model import DeltaModel
from deltamux_trainers.options import CHANGEABLE, DETERMINING, MIN_LENGTH, OPTIMIZERS, TrainOptions
from deltamux_trainers.output_dir import locked, output_exists, write_errors
from deltamux_trainers.training import checkpoints, distributed
from deltamux_trainers.training.callbacks import (
    EarlyStoppingCallback,
    InterruptCallback,
    ProgressCallback,
    SaveStepsCallback,
    ScheduleCallback,
    TrainingInterrupted,
)
from deltamux_trainers.training.trainer import DeltaTrainer

REPORT_FILE = "train_report.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run, also written to ``train_report.json`` next to the adapter.

    Attributes:
        loss: mean over the run, the part before a resume included.
        eval_loss: of the adapter's parameters; None without evaluation data.
        learning_rate: the highest of the schedule: that of the options, or the method's default for this base.
        share: trainable parameters divided by the base's.
        seconds: of the training loop, since the last resume.
        untaught_rows: rows without a token to learn, which were left out; truncated_rows: those that were cut.
        ranks: processes; a step has `batch_size` times `gradient_accumulation` rows of each.
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
    ranks: int = 1
    untaught_rows: int = 0
    truncated_rows: int = 0


def train(options: TrainOptions, *callbacks: TrainerCallback) -> TrainResult:
    """Trains an adapter and writes it to `options.output`, whole or not at all.

    Under torchrun every process calls it, with a share of the rows each; the main one writes, and all return the same
    result.

    Args:
        callbacks: further callbacks of transformers.
    Raises:
        InvalidConfigError, InvalidArgumentError: an option or a row of the data is wrong.
        FailedPreconditionError: the output holds an adapter already, or the checkpoint to resume from is missing,
            damaged or of another run; the base is not a decoder, or not whole; the device is missing; the loss is not
            finite; the output cannot be written, or another run writes to it.
        TrainingInterrupted: SIGINT or SIGTERM ended the run between two steps; `resume` continues it.
    """
    method = Registry().get(options.method)
    config = _parse_config(method, options.config)
    _check_output(options)
    pick_device(options.device)
    with locked(options.output) if distributed.is_main_process() else nullcontext():
        return _train(options, method, config, callbacks)


def _train(options: TrainOptions, method: Method, config: Any, callbacks: Sequence[TrainerCallback]) -> TrainResult:
    base, tokenizer = describe_base(options.model), load_tokenizer(options.model)
    rows, eval_rows, counts = _datasets(options, config, base, tokenizer)
    rate = options.rate(method.info, base.dims.hidden_size)
    arguments = _arguments(options, rate, bool(eval_rows))
    settings = _settings(options, config, base, rate, arguments)
    resumed = _checkpoint_to_resume(options, settings)
    set_seed(options.seed)
    interrupt, progress = InterruptCallback(), ProgressCallback()
    model = DeltaModel(load_model(options.model, options.dtype, options.device), base, method, config, options.seed)
    trainer = DeltaTrainer(
        settings,
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows or None,
        data_collator=DataCollator(tokenizer.pad_token_id or 0),
        callbacks=[
            *_callbacks(options),
            *([] if options.quiet else [progress]),
            interrupt,
            *callbacks,
            ScheduleCallback(model),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    with interrupt.handle_signals(), closing(progress):
        outcome = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if interrupt.stopped:
        raise TrainingInterrupted(options.output, trainer.state)
    result = _result(options, trainer, outcome, rate, counts)
    if distributed.is_main_process():
        trainer.free_memory()
        with torch.no_grad():
            final_config, tensors = model.schedule.finish(config, model.export())
            with write_errors(options.output):
                _write(method.checkpoint(final_config, base, tensors), options, result)
    distributed.barrier()
    return result


def _parse_config(method: Method, values: Mapping[str, Any]) -> Any:
    declared, own = values.get("peft_type"), method.info.peft_type
    if declared not in (None, own):
        raise InvalidConfigError(
            f"the config is of peft_type {declared!r}, and method {method.name!r} of {own!r}: train by that "
            "method, or leave peft_type out",
            metadata={"field": "peft_type", "method": method.name},
        )
    return method.parse(values)


def _result(
    options: TrainOptions, trainer: DeltaTrainer, outcome: TrainOutput, rate: float, counts: Mapping[str, int]
) -> TrainResult:
    """Loads the best parameters, if they were evaluated, and returns the run's result; every process calls it."""
    evaluates = trainer.eval_dataset is not None
    if evaluates:
        trainer.load_best()
    model = trainer.delta_model
    return TrainResult(
        output=options.output,
        method=options.method,
        steps=outcome.global_step,
        loss=trainer.mean_loss(),
        eval_loss=_eval_loss(trainer) if evaluates else None,
        parameters=model.num_trainable(),
        share=model.trainable_share(),
        seconds=outcome.metrics["train_runtime"],
        learning_rate=rate,
        ranks=distributed.world_size(),
        **counts,
    )


def _eval_loss(trainer: DeltaTrainer) -> float:
    """Returns the loss of the model's parameters: the best evaluation, or one now if the run was too short for any."""
    best = trainer.state.best_metric
    return trainer.evaluate()["eval_loss"] if best is None else best


def _arguments(options: TrainOptions, learning_rate: float, evaluates: bool) -> TrainingArguments:
    strategy = "epoch" if options.eval_steps is None else "steps"
    return TrainingArguments(
        output_dir=str(options.output / CHECKPOINTS),
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
        # Every evaluation has a checkpoint: the best parameters are read from it.
        save_strategy=strategy if evaluates or options.save_steps is None else "no",
        eval_steps=options.eval_steps,
        save_steps=options.eval_steps or 500,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        logging_steps=options.log_steps,
        disable_tqdm=True,
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
    callbacks: list[TrainerCallback] = []
    if options.save_steps is not None:
        callbacks.append(SaveStepsCallback(options.save_steps))
    if options.patience is not None:
        callbacks.append(EarlyStoppingCallback(options.patience))
    return callbacks


def _datasets(
    options: TrainOptions, config: Any, base: BaseModel, tokenizer: Any
) -> tuple[list[TokenizedSequence], list[TokenizedSequence], dict[str, int]]:
    """Returns the sequences to train on, those to evaluate on, and the counts of the result."""
    virtual, context = _virtual_tokens(config), base.dims.max_position
    if virtual and context - virtual < MIN_LENGTH:
        raise InvalidConfigError(
            f"num_virtual_tokens {virtual} leaves no room for a sequence in the base's context of {context} tokens",
            metadata={"field": "num_virtual_tokens"},
        )
    tokenize = RowTokenizer.for_base(base, tokenizer, options.max_length, options.turns, virtual)
    dataset = load_dataset(options.data, tokenize)
    counts = {"untaught_rows": len(dataset.untaught), "truncated_rows": len(dataset.truncated)}
    if options.eval_data is not None:
        return dataset.sequences, load_dataset(options.eval_data, tokenize).sequences, counts
    fraction, size = options.eval_fraction, len(dataset.rows)
    if fraction and not int(size * fraction):
        raise InvalidConfigError(
            f"eval_fraction {fraction} of {size} rows is less than one row: give more, or eval_data",
            metadata={"field": "eval_fraction"},
        )
    return *dataset.split(fraction, options.seed), counts


def _virtual_tokens(config: Any) -> int:
    """Returns the number of virtual tokens of a config; a composite's fields are configs, too."""
    values = [getattr(config, each.name) for each in dataclasses.fields(config)]
    nested = sum(_virtual_tokens(value) for value in values if dataclasses.is_dataclass(value))
    return nested + int(getattr(config, "num_virtual_tokens", 0))


def _settings(
    options: TrainOptions, config: Any, base: BaseModel, rate: float, arguments: TrainingArguments
) -> dict[str, Any]:
    """Returns all that determines the run's losses, by name, as JSON values."""
    files = {"data": options.data, "eval_data": options.eval_data}
    values = {
        **{name: getattr(options, name) for name in DETERMINING},
        **{name: file and _digest(file) for name, file in files.items()},
        **{f"config.{name}": value for name, value in asdict(config).items()},
        "base": base.fingerprint,
        "learning_rate": rate,
        "ranks": arguments.world_size,
    }
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _checkpoint_to_resume(options: TrainOptions, settings: Mapping[str, Any]) -> Path | None:
    if not options.resume:
        return None
    found = checkpoints.latest_checkpoint(options.output / CHECKPOINTS)
    saved = json.loads((found / checkpoints.RUN_FILE).read_text())["determined_by"]
    checkpoints.check_same_run(saved, settings, ", ".join(CHANGEABLE))
    state = json.loads((found / TRAINER_STATE_NAME).read_text())
    for name, asked, done in (
        ("max_steps", options.max_steps, state["global_step"]),
        ("epochs", options.epochs if options.max_steps is None else None, state["epoch"]),
    ):
        if asked is not None and asked < done:
            raise InvalidConfigError(
                f"{name} {asked} is less than the {done:.4g} that the run to resume has done", metadata={"field": name}
            )
    return found


def _check_output(options: TrainOptions) -> None:
    place = options.output.absolute()
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidConfigError(
            f"output {options.output} cannot be written: {nearest} is not a directory that this user may write to",
            metadata={"field": "output"},
        )
    _check_empty_place(options.output)
    if not options.resume and any((options.output / CHECKPOINTS).glob("checkpoint-*")):
        raise InvalidConfigError(
            f"{options.output} holds checkpoints of an unfinished run: resume it, or choose another output",
            metadata={"field": "resume"},
        )


def _check_empty_place(output: Path) -> None:
    """Refuses an output with an adapter or a model, whose files the new adapter would replace or be added to."""
    weights, report = output / TENSORS_FILE, output / REPORT_FILE
    # A run that was killed before it had written the config leaves weights and a report.
    if (output / CONFIG_FILE).exists() or (weights.exists() and not report.exists()):
        raise output_exists(f"{output} holds an adapter already: choose another output, or remove it")
    if (output / "config.json").exists():
        raise output_exists(
            f"{output} holds a model, to which transformers would add an adapter in its directory whenever it loads "
            "the model: choose another output"
        )
    if (output / CHECKPOINTS).exists() and not (output / CHECKPOINTS).is_dir():
        raise output_exists(
            f"{output / CHECKPOINTS} is a file, and checkpoints are written there: choose another output"
        )


def _write(checkpoint: Checkpoint, options: TrainOptions, result: TrainResult) -> None:
    """Writes the adapter's files to a staging directory and renames them, the config last: with it, they are whole."""
    losses = [result.loss, *([] if result.eval_loss is None else [result.eval_loss])]
    if not all(map(math.isfinite, losses)) or not all(t.isfinite().all() for t in checkpoint.tensors.values()):
        evaluated = "" if result.eval_loss is None else f" ({result.eval_loss:g} on the evaluation data)"
        raise FailedPreconditionError(
            f"training diverged: the mean loss is {result.loss:g}{evaluated}, and nothing is written. Lower the "
            f"learning rate ({result.learning_rate:g}), or use --dtype float32",
            reason="DIVERGED",
        )
    staging = options.output / checkpoints.STAGING_DIR
    shutil.rmtree(staging, ignore_errors=True)
    checkpoint.write(staging)
    report = {**asdict(result), "options": {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}}
    (staging / REPORT_FILE).write_text(json.dumps(report, indent=2, default=str) + "\n")
    for name in (REPORT_FILE, TENSORS_FILE, CONFIG_FILE):
        checkpoints.sync(staging / name)
        (staging / name).rename(options.output / name)
    staging.rmdir()
    checkpoints.sync(options.output)
    if not options.keep_checkpoints:
        checkpoints.remove_checkpoints(options.output / CHECKPOINTS)
