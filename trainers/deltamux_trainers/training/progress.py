"""Shows on stderr how a training run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerState

SHOWN = {"loss": "loss", "eval_loss": "evaluation loss", "learning_rate": "learning rate"}
"""What is shown of the figures that transformers logs, and its name."""


class Progress(TrainerCallback):
    """Prints the figures that are logged; of several ranks, the first does."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        console = Console(stderr=True, highlight=False)
        if not (console.is_terminal and state.is_world_process_zero):
            return
        steps = TextColumn("{task.completed}/{task.total} steps {task.description}")
        self._bar = Bar(BarColumn(), steps, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("", completed=state.global_step, total=state.max_steps)
        self._bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        figures = ", ".join(f"{name} {logs[key]:.4g}" for key, name in SHOWN.items() if key in (logs or {}))
        if not figures or not state.is_world_process_zero:
            return
        if self._bar:
            self._bar.update(self._task, description=figures)
        else:
            print(f"step {state.global_step}/{state.max_steps}: {figures}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar, which hides the terminal's cursor while it runs."""
        if self._bar:
            self._bar.stop()
            self._bar = None
