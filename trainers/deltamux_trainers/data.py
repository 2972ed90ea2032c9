"""Training data: JSONL in, token ids and labels out.

A row is one of ``{"text": ...}`` (all of it is learnt), ``{"prompt": ..., "completion": ...}`` (the completion is
learnt), ``{"messages": [{"role": ..., "content": ...}, ...]}`` (what the assistant says is learnt). Prompts are
tokenised as the server tokenises them; an end-of-sequence token follows what is learnt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltamux.errors import InvalidArgumentError

IGNORED = -100
"""Label of positions that carry no loss (torch's cross-entropy default)."""


class Segment(NamedTuple):
    """A piece of a row's text, and whether it is learnt."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Row:
    """One row: its text in pieces; `prompt` and `completion` where the row has them."""

    segments: tuple[Segment, ...]
    prompt: str | None = None
    completion: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids and, of equal length, labels: the id where it is learnt, IGNORED elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def read_rows(path: Path, tokenizer: Any) -> list[Row]:
    """Reads a JSONL file.

    Raises:
        InvalidArgumentError: naming the line, when it is no JSON or no row of a known form; or the file is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error.strerror}", metadata={"file": str(path)}) from error
    rows = [_row(line, f"{path}:{number}", tokenizer) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InvalidArgumentError(f"{path} has no rows", metadata={"file": str(path)})
    return rows


def encode(row: Row, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenises a row; what exceeds `max_length` is cut from the end."""
    ids: list[int] = []
    labels: list[int] = []
    for position, (text, learnt) in enumerate(row.segments):
        opens = position == 0 and (row.prompt is not None or len(row.segments) == 1)
        piece: list[int] = tokenizer.encode(text, add_special_tokens=opens)
        if learnt and tokenizer.eos_token_id is not None and (not piece or piece[-1] != tokenizer.eos_token_id):
            piece = [*piece, tokenizer.eos_token_id]
        ids += piece
        labels += piece if learnt else [IGNORED] * len(piece)
    # The first token follows nothing, so it is never predicted.
    return Encoded(tuple(ids[:max_length]), (IGNORED, *labels[1:max_length]))


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


def _row(line: str, where: str, tokenizer: Any) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise _bad(where, f"is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise _bad(where, "is no JSON object")
    if isinstance(values.get("text"), str):
        return Row((Segment(values["text"], True),))
    if isinstance(values.get("prompt"), str) and isinstance(values.get("completion"), str):
        prompt, completion = values["prompt"], values["completion"]
        return Row((Segment(prompt, False), Segment(completion, True)), prompt, completion)
    if isinstance(values.get("messages"), list):
        return Row(_conversation(values["messages"], where, tokenizer))
    raise _bad(where, "has neither text, nor prompt and completion, nor messages")


def _conversation(messages: list[Any], where: str, tokenizer: Any) -> tuple[Segment, ...]:
    if not getattr(tokenizer, "chat_template", None):
        raise _bad(
            where, "has messages, but the base model's tokenizer has no chat template: use prompt and completion"
        )
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages):
        raise _bad(where, "has a message without role and content")
    segments: list[Segment] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise _bad(where, "cannot be split into turns: the chat template renders earlier turns anew")
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    if not segments:
        raise _bad(where, "has no message of the assistant to learn")
    return tuple(segments)


def _bad(where: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{where} {problem}", reason="INVALID_DATA", metadata={"row": where})
