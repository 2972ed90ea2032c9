"""The demo's output: headings, progress and tables; plain lines without a terminal."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import TrainerCallback

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 130
_started = time.monotonic()


def heading(text: str) -> None:
    elapsed = time.monotonic() - _started
    console.print(f"\n[bold]{text}[/bold] [dim]({elapsed:.0f} s)[/dim]")


def line(text: str) -> None:
    console.print(f"  {text}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(*columns, title=title, title_justify="left", header_style="bold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


class TrainingBar(TrainerCallback):
    """Moves a progress bar with the steps of a training run."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress = progress
        self._task = task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step, total=state.max_steps)


@contextmanager
def training_bar(label: str, steps: int) -> Iterator[TrainerCallback]:
    """Yields a callback that shows a training run's progress, on a terminal only."""
    columns = (TextColumn("  {task.description:34}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        yield TrainingBar(progress, progress.add_task(label, total=steps))
