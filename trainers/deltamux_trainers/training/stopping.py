"""Ends a training run between two steps: when it is interrupted, or no longer improves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from deltamux_trainers.training import ranks


class TrainingInterrupted(KeyboardInterrupt):
    """A run was interrupted after a whole step, and has saved a checkpoint; the message says how to go on."""

    def __init__(self, output: Path, state: TrainerState) -> None:
        super().__init__(
            f"interrupted after step {state.global_step} of {state.max_steps}; the checkpoint is saved. To go on, give "
            f"the same command with --resume (output: {output})"
            if ranks.is_first()
            else ""
        )


class Interruption(TrainerCallback):
    """Lets SIGINT and SIGTERM end a run after the step in progress, with a checkpoint.

    A second SIGINT ends it at once. Of several processes, one that is interrupted stops all after the same step.

    Attributes:
        stopped: whether the run was ended.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals for the length of a block; threads other than the main one cannot, and do not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes on what a terminal has sent to every process already.
        if self._asked and number == signal.SIGINT and ranks.count() == 1:
            raise KeyboardInterrupt
        self._asked = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and ranks.any_of(self._asked, args.device):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A pass that is cut short has no end: going on evaluates where an uninterrupted run does.
        if self.stopped and state.epoch is not None and state.epoch % 1:
            control.should_evaluate = control.should_save = control.should_log = False


class Patience(TrainerCallback):
    """Ends a run after a number of evaluations without improvement; what it counts is in the run's log."""

    def __init__(self, evaluations: int) -> None:
        self._evaluations = evaluations

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(state, control)  # a run that goes on may have been ended by it, and stopped before it was written

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(state, control)

    def _check(self, state: TrainerState, control: TrainerControl) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        best = min(range(len(losses)), key=lambda index: losses[index], default=0)
        if len(losses) - 1 - best >= self._evaluations:
            control.should_training_stop = True
