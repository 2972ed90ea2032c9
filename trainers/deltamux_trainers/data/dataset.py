"""Tokenised datasets, read from JSONL files."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deltamux.errors import InvalidArgumentError, listed
from deltamux_trainers.data.rows import Row, read_rows
from deltamux_trainers.data.tokenization import RowTokenizer, TokenizedSequence
from deltamux_trainers.training import distributed

SHOWN_LINES = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedDataset:
    """The rows of a file with at least one learnt token, tokenised, and the lines of the rows without one.

    Attributes:
        sequences_by_row: of each of `rows`.
        untaught: lines of the rows without a learnt token; truncated: of the truncated ones.
        open_ended: lines of conversations with a turn that does not end with an end-of-sequence token.
    """

    rows: tuple[Row, ...]
    sequences_by_row: tuple[tuple[TokenizedSequence, ...], ...]
    untaught: tuple[int, ...]
    truncated: tuple[int, ...]
    open_ended: tuple[int, ...]

    @property
    def sequences(self) -> list[TokenizedSequence]:
        return [each for row in self.sequences_by_row for each in row]

    def split(self, fraction: float, seed: int) -> tuple[list[TokenizedSequence], list[TokenizedSequence]]:
        """Returns the sequences to train on and those of the held-out rows; a row's sequences stay together."""
        size = int(len(self.rows) * fraction)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [self.sequences_by_row[index] for index in order]
        return [each for row in shuffled[size:] for each in row], [each for row in shuffled[:size] for each in row]


def load_dataset(path: Path, tokenize: RowTokenizer, limit: int | None = None) -> TokenizedDataset:
    """Reads and tokenises a JSONL file; rows without a learnt token are left out, and logged with the truncated ones.

    Args:
        limit: rows to read; None reads all.

    Raises:
        InvalidArgumentError: INVALID_DATA; a row is wrong, or none has a token to learn.
    """
    tokenized = [(row, tokenize(row)) for row in read_rows(path, limit)]
    dataset = TokenizedDataset(
        rows=tuple(row for row, made in tokenized if made.sequences),
        sequences_by_row=tuple(made.sequences for _, made in tokenized if made.sequences),
        untaught=tuple(row.line for row, made in tokenized if not made.sequences),
        truncated=tuple(row.line for row, made in tokenized if made.truncated and made.sequences),
        open_ended=tuple(row.line for row, made in tokenized if not made.ends_with_eos),
    )
    too_long = any(made.truncated for _, made in tokenized if not made.sequences)
    _report(path, dataset, tokenize.max_length, too_long)
    return dataset


def _report(path: Path, dataset: TokenizedDataset, max_length: int, too_long: bool) -> None:
    """Logs the untaught, truncated and open-ended rows of a file; refuses a file without a token to learn."""
    why = f"their prompts fill a sequence of {max_length} tokens" if too_long else "they are empty or have weight 0"
    if not dataset.rows:
        raise InvalidArgumentError(
            f"{path}: no row has a token to learn, {why}: {_lines(dataset.untaught)}",
            reason="INVALID_DATA",
            metadata={"file": str(path)},
        )
    if not distributed.is_main_process():
        return
    if dataset.untaught:
        logger.warning("%s: without a token to learn, and left out, %s: %s", path, why, _lines(dataset.untaught))
    if dataset.truncated:
        logger.warning("%s: cut to %d tokens: %s", path, max_length, _lines(dataset.truncated))
    if dataset.open_ended:
        logger.warning(
            "%s: the chat template closes turns with no token at which the server stops: give requests a stop string, "
            "or generation_config.json of the base the token as eos_token_id: %s",
            path,
            _lines(dataset.open_ended),
        )


def _lines(numbers: Sequence[int]) -> str:
    return f"{len(numbers)} row{'s' if len(numbers) > 1 else ''} (line {listed(numbers, SHOWN_LINES)})"
