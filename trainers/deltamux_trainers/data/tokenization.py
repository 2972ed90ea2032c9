"""Tokens and labels of rows; docs/data.md describes the rules.

Prompts are tokenised by the server's functions (`deltamux.prompts`): a trained prompt has the tokens that `Generate`
sends. What is learnt ends with an end-of-sequence token, at which the server stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltamux.deltas import BaseModel
from deltamux.prompts import encode_text
from deltamux_trainers.data.chat_template import tokenize_turn
from deltamux_trainers.data.completions import (
    after_eos_problem,
    cut_at_eos,
    eos_token_ids,
    has_text_after_eos,
    tokenize_completion,
    with_eos,
)
from deltamux_trainers.data.rows import ChatRow, PromptRow, Row, TextRow

IGNORE_INDEX = -100
"""Label of the tokens without a loss (the default of torch's cross-entropy)."""


@dataclass(frozen=True)
class TokenizedSequence:
    """Token ids and, of equal length, labels: the id of a learnt token, IGNORE_INDEX elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_learnt(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class TokenizedRow:
    """The sequences of a row: one, or several where a later turn does not continue the tokens of the earlier ones.

    Attributes:
        sequences: those with a learnt token, truncated to `max_length`.
        truncated: whether tokens were cut.
        ends_with_eos: whether all that is learnt ends with an end-of-sequence token.
    """

    sequences: tuple[TokenizedSequence, ...]
    truncated: bool
    ends_with_eos: bool


@dataclass(frozen=True)
class RowTokenizer:
    """The tokenisation of rows for one base model.

    Attributes:
        eos_token_ids: tokens at which the server stops.
        max_length: tokens of a sequence; longer ones are cut at the end, so that each remaining token follows the same
            tokens as when it is served.
        turns: ``all`` or ``last``: which of the assistant's turns of a conversation are learnt.
        vocab_size: of the base; None leaves it unchecked.
    """

    tokenizer: Any
    eos_token_ids: frozenset[int]
    max_length: int = 1024
    turns: str = "all"
    vocab_size: int | None = None

    @classmethod
    def for_base(
        cls, base: BaseModel, tokenizer: Any, max_length: int = 1024, turns: str = "all", num_virtual_tokens: int = 0
    ) -> RowTokenizer:
        """Returns the tokenisation for a base model that was read from its files.

        Args:
            max_length: limited also by the base's context, less the adapter's virtual tokens.
        """
        available = base.dims.max_position - num_virtual_tokens
        eos = eos_token_ids(base.name, tokenizer)
        return cls(tokenizer, eos, max(0, min(max_length, available)), turns, base.dims.vocab_size)

    def __call__(self, row: Row) -> TokenizedRow:
        """Tokenises a row.

        Raises:
            InvalidArgumentError: INVALID_DATA, a conversation that the chat template cannot render or `Generate` cannot
                send, or an end-of-sequence token within the learnt text.
        """
        made = self._untruncated(row)
        self._check_vocabulary(row, made)
        sequences = tuple(each for each in (whole.truncate(self.max_length) for whole in made) if each.num_learnt)
        truncated = any(whole.lacks_turns or len(whole.ids) > self.max_length for whole in made)
        return TokenizedRow(sequences, truncated, all(whole.ends_with_eos for whole in made))

    def _untruncated(self, row: Row) -> list[_Untruncated]:
        if isinstance(row, TextRow):
            return [self._text(row)] if row.text else []
        if isinstance(row, PromptRow):
            return [self._prompt(row)] if row.prompt or row.completion else []
        assert isinstance(row, ChatRow)
        return self._chat(row)

    def _check_vocabulary(self, row: Row, made: Sequence[_Untruncated]) -> None:
        highest = max((max(whole.ids, default=0) for whole in made), default=0)
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise row.error(
                f"has the token {highest}, and the base model has {self.vocab_size}: the tokenizer belongs to another"
            )

    def _text(self, row: TextRow) -> _Untruncated:
        ids = with_eos(encode_text(self.tokenizer, row.text), self.tokenizer, self.eos_token_ids)
        return _Untruncated(ids, ids)

    def _prompt(self, row: PromptRow) -> _Untruncated:
        prompt = encode_text(self.tokenizer, row.prompt)
        ids = tokenize_completion(self.tokenizer, prompt, row.prompt, row.completion, encode_text)
        if ids is None:
            raise row.error("has a completion that the tokenizer cannot tokenise after its prompt", "completion")
        cut = cut_at_eos(ids, self.tokenizer, self.eos_token_ids)
        if cut.ends_with_eos and has_text_after_eos(cut, self.tokenizer):
            raise row.error(after_eos_problem(cut, self.tokenizer, "completion"), "completion")
        ids = cut.ids if cut.ends_with_eos else with_eos(ids, self.tokenizer, self.eos_token_ids)
        return _Untruncated(prompt + ids, [IGNORE_INDEX] * len(prompt) + ids)

    def _chat(self, row: ChatRow) -> list[_Untruncated]:
        """Returns the sequences of a conversation; a turn extends one where its prompt begins with its tokens."""
        made: list[_Untruncated] = []
        for index in row.learnt_turns[-1:] if self.turns == "last" else row.learnt_turns:
            turn = tokenize_turn(row, index, self.tokenizer, self.eos_token_ids, self.max_length)
            if not made or turn.prompt_ids[: len(made[-1].ids)] != made[-1].ids:
                made.append(_Untruncated([], []))
            whole = made[-1]
            added = turn.prompt_ids[len(whole.ids) :]
            whole.ids += added + turn.completion_ids
            whole.labels += [IGNORE_INDEX] * len(added) + turn.completion_ids
            whole.ends_with_eos = whole.ends_with_eos and turn.ends_with_eos
            if not turn.completion_ids:  # the prompts of the turns that follow are at least as long
                whole.lacks_turns = True
                break
        return made


@dataclass
class _Untruncated:
    """A sequence before it is truncated; `lacks_turns`: turns were left out, as their prompts are too long."""

    ids: list[int]
    labels: list[int]
    ends_with_eos: bool = True
    lacks_turns: bool = False

    def truncate(self, max_length: int) -> TokenizedSequence:
        ids, labels = self.ids[:max_length], self.labels[:max_length]
        # The first token follows nothing, so it is never predicted.
        return TokenizedSequence(tuple(ids), (IGNORE_INDEX, *labels[1:]) if ids else ())
