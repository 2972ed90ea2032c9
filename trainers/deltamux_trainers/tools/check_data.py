"""The report on a file of training data: counts, and sequences as text; no weights are loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from deltamux.deltas import BaseModel
from deltamux.options import declared
from deltamux_trainers.data.dataset import load_dataset
from deltamux_trainers.data.tokenization import IGNORE_INDEX, RowTokenizer, TokenizedSequence
from deltamux_trainers.loading import load_tokenizer
from deltamux_trainers.options import TrainOptions


@dataclass(frozen=True)
class DataReport:
    """The counts of a file's rows and tokens.

    Attributes:
        rows: with a token to learn; sequences: of these rows.
        tokens: of all sequences; learnt_tokens: the learnt ones of them; longest: tokens of the longest sequence.
        untaught_rows: without a token to learn; truncated_rows: cut to `max_length`.
        open_ended_rows: conversations with a turn that does not end with a token at which the server stops.
        examples: the first sequences as text, the learnt tokens between ``[[`` and ``]]``.
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
    dataset = load_dataset(path, RowTokenizer.for_base(BaseModel.from_pretrained(model), tokenizer, max_length, turns))
    sequences = dataset.sequences
    return DataReport(
        rows=len(dataset.rows),
        sequences=len(sequences),
        tokens=sum(len(each.input_ids) for each in sequences),
        learnt_tokens=sum(each.num_learnt for each in sequences),
        longest=max(len(each.input_ids) for each in sequences),
        untaught_rows=len(dataset.untaught),
        truncated_rows=len(dataset.truncated),
        open_ended_rows=len(dataset.open_ended),
        examples=tuple("".join(_pieces(each, tokenizer)) for each in islice(sequences, show)),
    )


def _pieces(sequence: TokenizedSequence, tokenizer: Any) -> Iterator[str]:
    pairs = zip(sequence.input_ids, sequence.labels, strict=True)
    for ignored, piece in groupby(pairs, key=lambda pair: pair[1] == IGNORE_INDEX):
        text = tokenizer.decode([token for token, _ in piece])
        yield text if ignored else f"[[{text}]]"
