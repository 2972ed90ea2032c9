"""The one training loop: a run's options in, an adapter's files out, for any method."""

from __future__ import annotations

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
from deltamux_trainers.data.files import Encoded, Encoder, collate, load_data
from deltamux_trainers.loading import describe_base, load_model, load_tokenizer, pick_device
from deltamux_trainers.model import DeltaModel
from deltamux_trainers.options import CHANGEABLE, DETERMINING, MIN_LENGTH, OPTIMIZERS, TrainOptions
from deltamux_trainers.training import checkpoints, ranks
from deltamux_trainers.training.progress import Progress
from deltamux_trainers.training.stopping import Interruption, Patience, TrainingInterrupted
from deltamux_trainers.training.trainer import DeltaTrainer, Saving, Scheduled
from deltamux_trainers.writing import held, told

REPORT_FILE = "train_report.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainResult:
    """What a run did; also written to ``train_report.json`` beside the adapter.

    Attributes:
        loss: mean loss over the training run, the part before a resume included.
        eval_loss: of the parameters that were kept; None without evaluation data.
        learning_rate: the highest of the run's schedule: the one asked for, or the method's default for this base.
        share: trainable parameters divided by the base's.
        seconds: of the training loop, since the last resume.
        untaught_rows: rows that had no token to learn and were left out; truncated_rows: those that were cut.
        ranks: processes that took part; each step sees `batch_size` rows of each, times `gradient_accumulation`.
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

    Started by torchrun, every process calls it: each takes its share of the rows, the first writes, and all return the
    same result.

    Args:
        callbacks: transformers' callbacks, for those who want to watch.
    Raises:
        InvalidConfigError, InvalidArgumentError: an option or a row of the data is wrong.
        FailedPreconditionError: the output holds an adapter already, or what is to be resumed is not there, damaged or
            of another run; the base is not a decoder, or not whole; the device is not there; the loss is not finite;
            the output cannot be written, or another run writes to it.
        TrainingInterrupted: SIGINT or SIGTERM ended the run between two steps; `resume` goes on from there.
    """
    method = Registry().get(options.method)
    config = _parsed(method, options.config)
    _check_output(options)
    pick_device(options.device)
    with held(options.output) if ranks.is_first() else nullcontext():
        return _train(options, method, config, callbacks)


def _train(options: TrainOptions, method: Method, config: Any, callbacks: Sequence[TrainerCallback]) -> TrainResult:
    base, tokenizer = describe_base(options.model), load_tokenizer(options.model)
    rows, eval_rows, counts = _datasets(options, config, base, tokenizer)
    rate = options.rate(method.info, base.dims.hidden_size)
    arguments = _arguments(options, rate, bool(eval_rows))
    determined_by = _determined_by(options, config, base, rate, arguments)
    resumed = _checkpoint_to_resume(options, determined_by)
    set_seed(options.seed)
    interruption, progress = Interruption(), Progress()
    trainer = DeltaTrainer(
        determined_by,
        model=DeltaModel(load_model(options.model, options.dtype, options.device), base, method, config, options.seed),
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows or None,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id or 0),
        callbacks=[*_callbacks(options), *([] if options.quiet else [progress]), interruption, *callbacks],
    )
    trainer.add_callback(Scheduled(trainer))
    trainer.remove_callback(PrinterCallback)
    with interruption.listening(), closing(progress):
        outcome = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if interruption.stopped:
        raise TrainingInterrupted(options.output, trainer.state)
    result = _result(options, trainer, outcome, rate, counts)
    if ranks.is_first():
        trainer.release()
        model = trainer.delta_model
        with torch.no_grad():
            written, tensors = model.schedule.finish(config, model.exported())
            with told(options.output):
                _write(method.checkpoint(written, base, tensors), options, result)
    ranks.wait_for_all()
    return result


def _parsed(method: Method, values: Mapping[str, Any]) -> Any:
    declared, own = values.get("peft_type"), method.info.peft_type
    if declared not in (None, own):
        raise InvalidConfigError(
            f"the config is of peft_type {declared!r}, and method {method.name!r} of {own!r}: train by the method that "
            "it is for, or leave peft_type out",
            metadata={"field": "peft_type", "method": method.name},
        )
    return method.parse(values)


def _result(
    options: TrainOptions, trainer: DeltaTrainer, outcome: TrainOutput, rate: float, counts: Mapping[str, int]
) -> TrainResult:
    """Takes the best parameters, where they were evaluated, and returns what the run did; every process calls it."""
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
        parameters=sum(p.numel() for p in model.parameters_by_name().values()),
        share=model.share(),
        seconds=outcome.metrics["train_runtime"],
        learning_rate=rate,
        ranks=ranks.count(),
        **counts,
    )


def _eval_loss(trainer: DeltaTrainer) -> float:
    """Returns the loss of the kept parameters: the best, or the last where the run was too short for an evaluation."""
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
        # The parameters of the best evaluation are read from its checkpoint.
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
    found: list[TrainerCallback] = []
    if options.save_steps is not None:
        found.append(Saving(options.save_steps))
    if options.patience is not None:
        found.append(Patience(options.patience))
    return found


def _datasets(
    options: TrainOptions, config: Any, base: BaseModel, tokenizer: Any
) -> tuple[list[Encoded], list[Encoded], dict[str, int]]:
    """Returns what is trained on, what is evaluated on, and the counts of the result."""
    virtual, context = _virtual_tokens(config), base.dims.max_position
    if virtual and context - virtual < MIN_LENGTH:
        raise InvalidConfigError(
            f"num_virtual_tokens {virtual} leaves no room for a sequence in the base's context of {context} tokens",
            metadata={"field": "num_virtual_tokens"},
        )
    encoder = Encoder.of(base, tokenizer, options.max_length, options.turns, virtual)
    data = load_data(options.data, encoder)
    counts = {"untaught_rows": len(data.untaught), "truncated_rows": len(data.truncated)}
    if options.eval_data is not None:
        return data.encoded, load_data(options.eval_data, encoder).encoded, counts
    fraction, size = options.eval_fraction, len(data.rows)
    if fraction and not int(size * fraction):
        raise InvalidConfigError(
            f"eval_fraction {fraction} of {size} rows is less than one row: give more, or eval_data",
            metadata={"field": "eval_fraction"},
        )
    return *data.split(fraction, options.seed), counts


def _virtual_tokens(config: Any) -> int:
    """Returns the virtual tokens of a method's options; a composite's parts have options of their own."""
    parts = [getattr(config, each.name) for each in dataclasses.fields(config)]
    of_parts = sum(_virtual_tokens(part) for part in parts if dataclasses.is_dataclass(part))
    return of_parts + int(getattr(config, "num_virtual_tokens", 0))


def _determined_by(
    options: TrainOptions, config: Any, base: BaseModel, rate: float, arguments: TrainingArguments
) -> dict[str, Any]:
    """Returns what the run's losses follow from, by name, as JSON values."""
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


def _checkpoint_to_resume(options: TrainOptions, determined_by: Mapping[str, Any]) -> Path | None:
    if not options.resume:
        return None
    found = checkpoints.newest_whole(options.output / CHECKPOINTS)
    saved = json.loads((found / checkpoints.RUN_FILE).read_text())["determined_by"]
    checkpoints.check_same_run(saved, determined_by, ", ".join(CHANGEABLE))
    state = json.loads((found / TRAINER_STATE_NAME).read_text())
    for name, asked, done in (
        ("max_steps", options.max_steps, state["global_step"]),
        ("epochs", options.epochs if options.max_steps is None else None, state["epoch"]),
    ):
        if asked is not None and asked < done:
            raise InvalidConfigError(
                f"{name} {asked} is less than the {done:.4g} that the run to resume has behind it",
                metadata={"field": name},
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
    """Refuses an output whose files the adapter's would replace, or stand beside as if they were of one model."""
    weights, report = output / TENSORS_FILE, output / REPORT_FILE
    # Weights beside a report are what a run leaves that was killed before it had written the config.
    if (output / CONFIG_FILE).exists() or (weights.exists() and not report.exists()):
        raise FailedPreconditionError(
            f"{output} holds an adapter already: choose another output, or remove it", reason="OUTPUT_EXISTS"
        )
    if (output / "config.json").exists():
        raise FailedPreconditionError(
            f"{output} holds a model, to which transformers would add an adapter beside it whenever it loads the "
            "model: choose another output",
            reason="OUTPUT_EXISTS",
        )
    if (output / CHECKPOINTS).exists() and not (output / CHECKPOINTS).is_dir():
        raise FailedPreconditionError(
            f"{output / CHECKPOINTS} is a file, and checkpoints are written there: choose another output",
            reason="OUTPUT_EXISTS",
        )


def _write(checkpoint: Checkpoint, options: TrainOptions, result: TrainResult) -> None:
    """Writes the adapter's files beside and renames them in, the config last: an adapter is whole when it has one."""
    losses = [result.loss, *([] if result.eval_loss is None else [result.eval_loss])]
    if not all(map(math.isfinite, losses)) or not all(t.isfinite().all() for t in checkpoint.tensors.values()):
        evaluated = "" if result.eval_loss is None else f" ({result.eval_loss:g} on the evaluation data)"
        raise FailedPreconditionError(
            f"training diverged: the mean loss is {result.loss:g}{evaluated}, and nothing is written. Lower the "
            f"learning rate ({result.learning_rate:g}), or use --dtype float32",
            reason="DIVERGED",
        )
    staging = options.output / checkpoints.STAGING
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
        checkpoints.remove_all(options.output / CHECKPOINTS)
