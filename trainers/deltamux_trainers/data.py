"""Training data: rows in, token ids and labels out. docs/data.md describes the format and the rules.

Prompts are tokenised by the functions that the server uses (`deltamux.prompts`), so that a trained context is, token by
token, what `Generate` sends; what is learnt ends with the token at which the server stops.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel
from deltamux.errors import InvalidArgumentError
from deltamux.prompts import encode_text
from deltamux_trainers.chats import encode_turn
from deltamux_trainers.completions import closed, end_tokens, follow, up_to_the_end
from deltamux_trainers.rows import ChatRow, PromptRow, Row, TextRow, read_rows

IGNORED = -100
"""Label of positions that carry no loss (torch's cross-entropy default)."""
SHOWN_LINES = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """Token ids and, of equal length, labels: the id where it is learnt, IGNORED elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learnt(self) -> int:
        """Number of tokens that are learnt."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Sequences:
    """What a row becomes: one sequence, or several where later turns do not continue the earlier ones' tokens.

    Attributes:
        kept: those with a token to learn, cut to the longest allowed.
        truncated: whether tokens were cut.
        ended: whether the server stops at the last token of everything learnt.
    """

    kept: tuple[Encoded, ...]
    truncated: bool
    ended: bool


@dataclass(frozen=True)
class Encoder:
    """Turns rows into token ids and labels.

    Attributes:
        ends: ids of the tokens at which the server stops.
        max_length: tokens of a sequence; longer ones are cut at the end, so that every token that is left follows what
            it follows when it is served.
        turns: ``all`` or ``last``: which of the assistant's turns of a conversation are learnt.
        vocab_size: of the base; None leaves it unchecked.
    """

    tokenizer: Any
    ends: frozenset[int]
    max_length: int = 1024
    turns: str = "all"
    vocab_size: int | None = None

    @classmethod
    def of(cls, base: BaseModel, tokenizer: Any, max_length: int = 1024, turns: str = "all") -> Encoder:
        """Returns the encoder of a base model that was read from its files."""
        return cls(tokenizer, end_tokens(base.name, tokenizer), max_length, turns, base.dims.vocab_size)

    def __call__(self, row: Row) -> Sequences:
        """Encodes a row.

        Raises:
            InvalidArgumentError: INVALID_DATA, a conversation that the chat template or `Generate` cannot take.
        """
        ended = True
        if isinstance(row, TextRow):
            whole = [self._text(row)] if row.text else []
        elif isinstance(row, PromptRow):
            whole = [self._prompt(row)] if row.prompt or row.completion else []
        else:
            assert isinstance(row, ChatRow)
            whole, ended = self._chat(row)
        outside = next(
            (t for ids, _ in whole for t in ids if self.vocab_size is not None and t >= self.vocab_size), None
        )
        if outside is not None:
            raise row.refused(
                f"has the token {outside}, which the base model does not have: its tokenizer is another's"
            )
        cut = [_encoded(ids, labels, self.max_length) for ids, labels in whole]
        truncated = any(len(ids) > self.max_length for ids, _ in whole)
        return Sequences(tuple(each for each in cut if each.learnt), truncated, ended)

    def _text(self, row: TextRow) -> tuple[list[int], list[int]]:
        ids = closed(encode_text(self.tokenizer, row.text), self.tokenizer, self.ends)
        return ids, ids

    def _prompt(self, row: PromptRow) -> tuple[list[int], list[int]]:
        context = encode_text(self.tokenizer, row.prompt)
        ids = follow(self.tokenizer, context, row.prompt, row.completion, encode_text)
        if ids is None:
            raise row.refused("has a completion that the tokenizer cannot tokenise behind its prompt", "completion")
        end = up_to_the_end(ids, self.tokenizer, self.ends)
        blank = not self.tokenizer.decode(end.beyond, skip_special_tokens=True).strip()
        ids = end.ids if end.ended and blank else closed(ids, self.tokenizer, self.ends)
        return context + ids, [IGNORED] * len(context) + ids

    def _chat(self, row: ChatRow) -> tuple[list[tuple[list[int], list[int]]], bool]:
        """Returns the conversation's turns: one sequence for as long as a prompt continues what came before it."""
        whole: list[tuple[list[int], list[int]]] = []
        ended = True
        for index in row.learnt[-1:] if self.turns == "last" else row.learnt:
            turn = encode_turn(row, index, self.tokenizer, self.ends)
            ended = ended and turn.ended
            ids, labels = whole[-1] if whole else ([], [])
            if not whole or turn.context[: len(ids)] != ids:
                whole.append((ids := [], labels := []))
            added = turn.context[len(ids) :]
            ids += added + turn.completion
            labels += [IGNORED] * len(added) + turn.completion
        return whole, ended


@dataclass(frozen=True)
class Data:
    """A file's rows that teach something, and what became of the others.

    Attributes:
        rows: those with a token to learn; sequences: of each of them.
        untaught: lines of the rows without one; truncated: of those that were cut.
        open_ended: lines of conversations whose turns end with no token at which the server stops.
    """

    path: Path
    max_length: int
    rows: tuple[Row, ...]
    sequences: tuple[tuple[Encoded, ...], ...]
    untaught: tuple[int, ...] = field(default=())
    truncated: tuple[int, ...] = field(default=())
    open_ended: tuple[int, ...] = field(default=())

    @property
    def encoded(self) -> list[Encoded]:
        return [each for row in self.sequences for each in row]

    def split(self, fraction: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
        """Returns the sequences of all rows but a share, and of that share; all of a row's are on one side."""
        size = int(len(self.rows) * fraction)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [self.sequences[index] for index in order]
        return [e for row in shuffled[size:] for e in row], [e for row in shuffled[:size] for e in row]


def load_data(path: Path, encoder: Encoder, limit: int | None = None) -> Data:
    """Reads and encodes a JSONL file; rows that teach nothing are left out, and logged with those that were cut.

    Args:
        limit: rows to read; None reads all.

    Raises:
        InvalidArgumentError: INVALID_DATA; a row is wrong, or none has a token to learn.
    """
    rows = read_rows(path, limit)
    encoded = [(row, encoder(row)) for row in rows]
    data = Data(
        path,
        encoder.max_length,
        tuple(row for row, made in encoded if made.kept),
        tuple(made.kept for _, made in encoded if made.kept),
        tuple(row.line for row, made in encoded if not made.kept),
        tuple(row.line for row, made in encoded if made.truncated and made.kept),
        tuple(row.line for row, made in encoded if not made.ended),
    )
    limited = any(made.truncated for _, made in encoded if not made.kept)
    why = "their prompts fill max_length {}" if limited else "they are empty, or all their messages have weight 0"
    untaught = f"teach nothing ({why.format(encoder.max_length)}): {_lines(data.untaught)}"
    if not data.rows:
        raise InvalidArgumentError(
            f"{path}: all {len(rows)} rows {untaught}", reason="INVALID_DATA", metadata={"file": str(path)}
        )
    if data.untaught:
        logger.warning("%s: %d of %d rows are left out, they %s", path, len(data.untaught), len(rows), untaught)
    if data.truncated:
        shown = _lines(data.truncated)
        logger.warning("%s: %d rows are cut at max_length %d: %s", path, len(data.truncated), encoder.max_length, shown)
    if data.open_ended:
        logger.warning(
            "%s: the chat template closes turns with no token at which the server stops (%s): give requests a stop "
            "string, or the base's generation_config.json the token as eos_token_id",
            path,
            _lines(data.open_ended),
        )
    return data


def collate(rows: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Pads rows on the right to the longest: input_ids, attention_mask and labels, all [rows, longest] int64."""
    longest = max(len(row.input_ids) for row in rows)
    batch = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    padded = {name: torch.full((len(rows), longest), fill) for name, fill in batch.items()}
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        padded["input_ids"][index, :length] = torch.tensor(row.input_ids)
        padded["attention_mask"][index, :length] = 1
        padded["labels"][index, :length] = torch.tensor(row.labels)
    return padded


def _encoded(ids: Sequence[int], labels: Sequence[int], max_length: int) -> Encoded:
    # The first token follows nothing, so it is never predicted.
    return Encoded(tuple(ids[:max_length]), (IGNORED, *labels[1:max_length])[: len(ids)])


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN_LINES]))
    more = f" and {len(numbers) - SHOWN_LINES} more" if len(numbers) > SHOWN_LINES else ""
    return f"line{'s' if len(numbers) > 1 else ''} {shown}{more}"
