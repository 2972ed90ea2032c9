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
from deltamux_trainers.data.chats import encode_turn
from deltamux_trainers.data.completions import closed, end_tokens, follow, never_generated, says_more, up_to_the_end
from deltamux_trainers.data.rows import ChatRow, PromptRow, Row, TextRow, read_rows
from deltamux_trainers.training import ranks

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
    def of(
        cls,
        base: BaseModel,
        tokenizer: Any,
        max_length: int = 1024,
        turns: str = "all",
        num_virtual_tokens: int = 0,
    ) -> Encoder:
        """Returns the encoder of a base model that was read from its files.

        Args:
            max_length: what the base's context holds beside the adapter's virtual tokens is a limit as well.
        """
        room = base.dims.max_position - num_virtual_tokens
        ends = end_tokens(base.name, tokenizer)
        return cls(tokenizer, ends, max(0, min(max_length, room)), turns, base.dims.vocab_size)

    def __call__(self, row: Row) -> Sequences:
        """Encodes a row.

        Raises:
            InvalidArgumentError: INVALID_DATA, a conversation that the chat template or `Generate` cannot take, or an
                end token within what is to be learnt.
        """
        made = self._made(row)
        self._check_vocabulary(row, made)
        kept = tuple(each for each in (_encoded(whole, self.max_length) for whole in made) if each.learnt)
        truncated = any(whole.cut or len(whole.ids) > self.max_length for whole in made)
        return Sequences(kept, truncated, all(whole.ended for whole in made))

    def _made(self, row: Row) -> list[_Whole]:
        if isinstance(row, TextRow):
            return [self._text(row)] if row.text else []
        if isinstance(row, PromptRow):
            return [self._prompt(row)] if row.prompt or row.completion else []
        assert isinstance(row, ChatRow)
        return self._chat(row)

    def _check_vocabulary(self, row: Row, made: Sequence[_Whole]) -> None:
        highest = max((max(whole.ids, default=0) for whole in made), default=0)
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise row.refused(
                f"has the token {highest}, and the base model has {self.vocab_size}: the tokenizer belongs to another"
            )

    def _text(self, row: TextRow) -> _Whole:
        ids = closed(encode_text(self.tokenizer, row.text), self.tokenizer, self.ends)
        return _Whole(ids, ids)

    def _prompt(self, row: PromptRow) -> _Whole:
        context = encode_text(self.tokenizer, row.prompt)
        ids = follow(self.tokenizer, context, row.prompt, row.completion, encode_text)
        if ids is None:
            raise row.refused("has a completion that the tokenizer cannot tokenise behind its prompt", "completion")
        end = up_to_the_end(ids, self.tokenizer, self.ends)
        if end.ended and says_more(end, self.tokenizer):
            raise row.refused(never_generated(end, self.tokenizer, "completion"), "completion")
        ids = end.ids if end.ended else closed(ids, self.tokenizer, self.ends)
        return _Whole(context + ids, [IGNORED] * len(context) + ids)

    def _chat(self, row: ChatRow) -> list[_Whole]:
        """Returns the conversation's turns: one sequence for as long as a prompt continues what came before it."""
        made: list[_Whole] = []
        for index in row.learnt[-1:] if self.turns == "last" else row.learnt:
            turn = encode_turn(row, index, self.tokenizer, self.ends, self.max_length)
            if not made or turn.context[: len(made[-1].ids)] != made[-1].ids:
                made.append(_Whole([], []))
            whole = made[-1]
            added = turn.context[len(whole.ids) :]
            whole.ids += added + turn.completion
            whole.labels += [IGNORED] * len(added) + turn.completion
            whole.ended = whole.ended and turn.ended
            if not turn.completion:  # what follows has this context before it, and is as long at least
                whole.cut = True
                break
        return made


@dataclass
class _Whole:
    """A sequence before it is cut to the longest allowed; `cut`: whether turns were left out of it."""

    ids: list[int]
    labels: list[int]
    ended: bool = True
    cut: bool = False


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
    _tell(data, any(made.truncated for _, made in encoded if not made.kept))
    return data


def _tell(data: Data, too_long: bool) -> None:
    """Logs what became of a file's rows, and refuses a file that teaches nothing."""
    why = (
        f"their prompts fill a sequence of {data.max_length} tokens" if too_long else "they are empty or have weight 0"
    )
    if not data.rows:
        raise InvalidArgumentError(
            f"{data.path}: no row has a token to learn, {why}: {_lines(data.untaught)}",
            reason="INVALID_DATA",
            metadata={"file": str(data.path)},
        )
    if not ranks.is_first():
        return
    if data.untaught:
        logger.warning("%s: without a token to learn, and left out, %s: %s", data.path, why, _lines(data.untaught))
    if data.truncated:
        logger.warning("%s: cut to %d tokens: %s", data.path, data.max_length, _lines(data.truncated))
    if data.open_ended:
        logger.warning(
            "%s: the chat template closes turns with no token at which the server stops: give requests a stop string, "
            "or generation_config.json of the base the token as eos_token_id: %s",
            data.path,
            _lines(data.open_ended),
        )


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


def _encoded(whole: _Whole, max_length: int) -> Encoded:
    ids, labels = whole.ids[:max_length], whole.labels[:max_length]
    # The first token follows nothing, so it is never predicted.
    return Encoded(tuple(ids), (IGNORED, *labels[1:]) if ids else ())


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN_LINES]))
    more = f" and {len(numbers) - SHOWN_LINES} more" if len(numbers) > SHOWN_LINES else ""
    return f"{len(numbers)} row{'s' if len(numbers) > 1 else ''} (line {shown}{more})"
