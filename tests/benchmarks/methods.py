"""What every method learns with its own defaults: score, trainable share, time and file size, on one task.

    .venv/bin/python -m benchmarks.methods --output methods.json --markdown ../docs/methods/scores.md     (in tests/)

Every registered method that trains is trained over the demo's base on one tenant's task: the same rows in the same
order, the same number of steps, and the method's own learning rate, initialisation and targets. The held-out rows share
no example with those that are trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.command import machine, write_output
from deltamux.registry import Registry
from deltamux_trainers import EvaluateOptions, TrainOptions, compress, evaluate, train
from deltamux_trainers.demo.base import BASE_MODEL
from deltamux_trainers.demo.tasks import TASKS, TenantTask

BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"
COMPRESSED_FROM = "full"
FORMS: dict[str, dict[str, Any]] = {"bitdelta": {}, "svd": {"rank": 16}}


@dataclass(frozen=True)
class Score:
    """One row of the table.

    Attributes:
        learning_rate: that the run used; None where nothing was trained.
        parameters: trainable ones; share: of the base's.
        seconds: of the training loop.
        kib: of adapter_model.safetensors.
        exact_match: share of greedy answers that are right to the letter.
        error: relative error of a compression, as it reported it.
    """

    method: str
    loss: float
    accuracy: float
    exact_match: float
    learning_rate: float | None = None
    parameters: int | None = None
    share: float | None = None
    seconds: float | None = None
    kib: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Bench:
    """One task over one base, and a folder for data and adapters."""

    folder: Path
    task: TenantTask
    steps: int
    batch_size: int
    limit: int
    seed: int

    def write_data(self) -> None:
        """Writes rows of prompt and completion, as the base's chat template renders them."""
        tokenizer = AutoTokenizer.from_pretrained(str(BASE_MODEL))
        for name, count, held_out in (("train", 2000, False), ("eval", self.limit, True)):
            rows = []
            for *before, answer in self.task.examples(count, held_out=held_out):
                prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
                rows.append(json.dumps({"prompt": prompt, "completion": answer["content"]}))
            (self.folder / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")

    def scores(self, methods: Sequence[str]) -> Iterator[Score]:
        """Yields the base's row, every method's, and those of the compressed forms."""
        self.write_data()
        yield Score(method="base", **self.measured(None))
        for name in methods:
            yield self.trained(name)
            if name == COMPRESSED_FROM:
                yield from (self.compressed(name, form, given) for form, given in FORMS.items())

    def trained(self, method: str) -> Score:
        output = self.folder / method
        options = TrainOptions(
            method=method,
            model=str(BASE_MODEL),
            data=self.folder / "train.jsonl",
            output=output,
            max_steps=self.steps,
            batch_size=self.batch_size,
            log_steps=self.steps,
            seed=self.seed,
            device="cpu",
            quiet=True,
        )
        done = train(options)
        return Score(
            method=method,
            learning_rate=done.learning_rate,
            parameters=done.parameters,
            share=done.share,
            seconds=done.seconds,
            kib=_kib(output),
            **self.measured(output),
        )

    def compressed(self, method: str, form: str, given: dict[str, Any]) -> Score:
        output = self.folder / f"{method}-{form}"
        done = compress(str(BASE_MODEL), self.folder / method, output, form=form, **given)
        rank = f" {given['rank']}" if given else ""
        return Score(f"{method}, {form}{rank}", error=done.error, kib=_kib(output), **self.measured(output))

    def measured(self, adapter: Path | None) -> dict[str, Any]:
        options = EvaluateOptions(
            str(BASE_MODEL),
            self.folder / "eval.jsonl",
            adapter=adapter,
            batch_size=100,
            max_new_tokens=32,
            generate=True,
            device="cpu",
        )
        done = evaluate(options)
        return {"loss": done.loss, "accuracy": done.accuracy, "exact_match": done.exact_match or 0.0}


def _kib(directory: Path) -> float:
    return (directory / "adapter_model.safetensors").stat().st_size / 1024


HEAD = (
    "method", "learning rate", "trainable", "of the base", "seconds", "KiB", "error", "loss", "accuracy", "exact",
)  # fmt: skip


def cells(score: Score) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        score.method,
        shown(score.learning_rate, ".2g"),
        shown(score.parameters, ",d"),
        shown(score.share, ".2%"),
        shown(score.seconds, ".0f"),
        shown(score.kib, ",.0f"),
        shown(score.error, ".2f"),
        f"{score.loss:.3f}",
        f"{score.accuracy:.3f}",
        f"{score.exact_match:.2f}",
    )


def line(values: Sequence[str]) -> str:
    widths = (16, 13, 10, 11, 7, 7, 5, 7, 8, 5)
    first, *rest = (f"{value:{'<' if i == 0 else '>'}{widths[i]}}" for i, value in enumerate(values))
    return "  ".join([first, *rest])


def markdown(scores: Sequence[Score], bench: Bench, command: str) -> str:
    rows = [HEAD, tuple("---" if i == 0 else "---:" for i in range(len(HEAD))), *map(cells, scores)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    about = (
        f"{date.today():%Y-%m-%d}, {machine()}, {torch.get_num_threads()} of them used: `{command}`\n\n"
        f"Task: {bench.task.title}; {bench.steps} steps of {bench.batch_size} rows, {bench.limit} held-out rows."
    )
    return f"{about}\n\n{table}"


def rewrite(file: Path, text: str) -> None:
    """Replaces what stands between the two markers of a file."""
    old = file.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{file} lacks the lines {BEGIN} and {END}")
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def trainable() -> list[str]:
    return [method.name for method in Registry().methods() if method.info.trains]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--methods", help="names with commas between (default: all that train)")
    parser.add_argument("--task", choices=[task.tenant for task in TASKS], default="initech", help="tenant of the demo")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, default=100, help="held-out rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--markdown", type=Path, help="file whose table between the markers is replaced")
    return parser.parse_args(arguments)


def command(given: argparse.Namespace) -> str:
    """Returns the command that makes this table, without the names of its files."""
    chosen = {name: value for name, value in vars(given).items() if name not in ("output", "markdown")}
    parts = [f"--{n.replace('_', '-')} {value}" for n, value in chosen.items() if value != getattr(parse([]), n)]
    return f'make methods ARGS="{" ".join(parts)}"' if parts else "make methods"


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    warnings.filterwarnings("ignore")  # what libraries say of themselves
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it so
    task = next(task for task in TASKS if task.tenant == given.task)
    done: list[Score] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), task, given.steps, given.batch_size, given.limit, given.seed)
        print(line(HEAD), flush=True)
        for score in bench.scores(given.methods.split(",") if given.methods else trainable()):
            done.append(score)
            print(line(cells(score)), flush=True)
            _save(given, bench, done)  # what is measured is kept, whatever comes after it


def _save(given: argparse.Namespace, bench: Bench, done: Sequence[Score]) -> None:
    about = {"date": f"{date.today()}", "machine": machine(), "task": bench.task.title, "steps": given.steps}
    about |= {"batch_size": given.batch_size, "held_out": given.limit, "seed": given.seed}
    write_output(given.output, {**about, "rows": [asdict(s) for s in done]})
    if given.markdown:
        rewrite(given.markdown, markdown(done, bench, command(given)))


if __name__ == "__main__":
    main()
