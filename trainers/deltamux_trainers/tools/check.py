"""What training would make of a file of data: counts, and sequences to read; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from deltamux.deltas import BaseModel
from deltamux.options import declared
from deltamux_trainers.data.files import IGNORED, Encoded, Encoder, load_data
from deltamux_trainers.loading import load_tokenizer
from deltamux_trainers.options import TrainOptions


@dataclass(frozen=True)
class DataReport:
    """What became of a file's rows.

    Attributes:
        rows: that have a token to learn; sequences: that they make.
        tokens: of all sequences; learnt_tokens: of those, the learnt ones; longest: tokens of the longest sequence.
        untaught_rows: without a token to learn; truncated_rows: cut to the longest allowed.
        open_ended_rows: conversations whose turns end with no token at which the server stops.
        examples: the first sequences as text, what is learnt between ``[[`` and ``]]``.
    """

    rows: int
    sequences: int
    tokens: int
    learnt_tokens: int
    longest: int
    untaught_rows: int
    truncated_rows: int
    open_ended_rows: int
    examples: tuple[str, ...]


def check_data(model: str, path: Path, *, max_length: int = 1024, turns: str = "all", show: int = 0) -> DataReport:
    """Reads, renders and tokenises a JSONL file as training on it would.

    Args:
        model: directory or Hugging Face id of the base: its tokenizer, chat template and end tokens are used.
        show: how many sequences to return as text.

    Raises:
        InvalidConfigError: max_length is out of range.
        InvalidArgumentError: INVALID_DATA, a row is wrong, or none has a token to learn.
        FailedPreconditionError: the base or its tokenizer cannot be read.
    """
    declared(TrainOptions)["max_length"].check("max_length", max_length)
    tokenizer = load_tokenizer(model)
    data = load_data(path, Encoder.of(BaseModel.from_pretrained(model), tokenizer, max_length, turns))
    encoded = data.encoded
    return DataReport(
        rows=len(data.rows),
        sequences=len(encoded),
        tokens=sum(len(each.input_ids) for each in encoded),
        learnt_tokens=sum(each.learnt for each in encoded),
        longest=max(len(each.input_ids) for each in encoded),
        untaught_rows=len(data.untaught),
        truncated_rows=len(data.truncated),
        open_ended_rows=len(data.open_ended),
        examples=tuple("".join(_pieces(each, tokenizer)) for each in islice(encoded, show)),
    )


def _pieces(encoded: Encoded, tokenizer: Any) -> Iterator[str]:
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    for ignored, piece in groupby(pairs, key=lambda pair: pair[1] == IGNORED):
        text = tokenizer.decode([token for token, _ in piece])
        yield text if ignored else f"[[{text}]]"
