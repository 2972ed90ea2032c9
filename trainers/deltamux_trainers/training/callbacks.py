"""Callbacks of the training loop: progress, saving, early stopping, interruption, and the method's schedule."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from deltamux_trainers.model import DeltaModel
from deltamux_trainers.training import distributed

SHOWN_METRICS = {"loss": "loss", "eval_loss": "evaluation loss", "learning_rate": "learning rate"}
"""The metrics of transformers' log that are shown, and their names."""


class TrainingInterrupted(KeyboardInterrupt):
    """The end of a run that was interrupted after a whole step, with a checkpoint; the message says how to resume."""

    def __init__(self, output: Path, state: TrainerState) -> None:
        super().__init__(
            f"interrupted after step {state.global_step} of {state.max_steps}; the checkpoint is saved. To go on, give "
            f"the same command with --resume (output: {output})"
            if distributed.is_main_process()
            else ""
        )


class InterruptCallback(TrainerCallback):
    """Ends a run after the present step, with a checkpoint, on SIGINT or SIGTERM.

    A second SIGINT ends it at once. If any process is interrupted, all end after the same step.

    Attributes:
        stopped: whether the run was ended.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._requested = False

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handles the signals during a block; in threads other than the main one, which get none, it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # torchrun sends a SIGINT that the terminal has sent to every process already.
        if self._requested and number == signal.SIGINT and distributed.world_size() == 1:
            raise KeyboardInterrupt
        self._requested = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and distributed.any_process(self._requested, args.device):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # An epoch that is cut short is not evaluated: the resumed run evaluates at its end.
        if self.stopped and state.epoch is not None and state.epoch % 1:
            control.should_evaluate = control.should_save = control.should_log = False


class EarlyStoppingCallback(TrainerCallback):
    """Ends a run after `patience` evaluations without improvement, counted in the run's log."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(state, control)  # the run may have ended so before it was killed and resumed

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(state, control)

    def _check(self, state: TrainerState, control: TrainerControl) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        best = min(range(len(losses)), key=lambda index: losses[index], default=0)
        if len(losses) - 1 - best >= self._patience:
            control.should_training_stop = True


class SaveStepsCallback(TrainerCallback):
    """Saves a checkpoint every `save_steps` steps, independently of the evaluations.

    At the end of an epoch it is saved after the evaluation: a run resumed from one before it would skip the evaluation.
    """

    def __init__(self, save_steps: int) -> None:
        self._save_steps = save_steps

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        evaluates_next = args.eval_strategy == IntervalStrategy.EPOCH and (
            state.global_step >= state.max_steps or not (state.epoch or 0.0) % 1
        )
        if state.global_step % self._save_steps == 0 and not evaluates_next:
            control.should_save = True


class ScheduleCallback(TrainerCallback):
    """Runs the method's schedule: which parameters are frozen before an update, and what changes them after it."""

    def __init__(self, model: DeltaModel) -> None:
        self._model = model

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        resumed = self._model.schedule.state
        self._model.start_schedule(state.max_steps)
        self._model.schedule.state = {**self._model.schedule.state, **resumed}

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        frozen = self._model.schedule.frozen(state.global_step)
        for name, parameter in self._model.parameters_by_name().items():
            parameter.requires_grad_(name not in frozen)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._model.schedule.after_update(state.global_step + 1, self._model.parameters_by_name())


class ProgressCallback(TrainerCallback):
    """Prints steps and metrics to stderr, in the main process: a bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        console = Console(stderr=True, highlight=False)
        if not (console.is_terminal and state.is_world_process_zero):
            return
        steps = TextColumn("{task.completed}/{task.total} steps {task.description}")
        self._bar = Progress(BarColumn(), steps, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("", completed=state.global_step, total=state.max_steps)
        self._bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        metrics = ", ".join(f"{name} {logs[key]:.4g}" for key, name in SHOWN_METRICS.items() if key in (logs or {}))
        if not metrics or not state.is_world_process_zero:
            return
        if self._bar:
            self._bar.update(self._task, description=metrics)
        else:
            print(f"step {state.global_step}/{state.max_steps}: {metrics}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar, which hides the terminal's cursor until then."""
        if self._bar:
            self._bar.stop()
            self._bar = None
