"""Training data as it is written: a JSONL file in, rows of a known form out. docs/data.md describes the format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from deltamux.errors import InvalidArgumentError

MAX_LINE_BYTES = 16 * 1024**2
"""Bytes that one row may have."""

MAX_SHOWN = 20
"""Keys of a row that a message lists at most, and characters of each."""

FORMS = ("text", "prompt", "messages")
OUTSIDE_KEYS = ("tools", "functions", "function_call", "documents", "chat_template_kwargs")
"""Keys of a row that would change its prompt; `Generate` cannot send them."""
PROMPT_KEYS = ("system", "system_prompt", "history")
"""Keys of other programs' rows that hold a part of the prompt."""
LEARNT_KEYS = ("train", "training", "trainable", "loss")
"""Keys by which other programs' messages say whether they are learnt; here, `weight` does."""
CALL_KEYS = ("tool_calls", "function_call")

_FOREIGN = {
    b"\x1f\x8b": "gzip data: unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "zstd data: unpack it first (unzstd)",
    b"\xfd7zXZ": "xz data: unpack it first (unxz)",
    b"BZh": "bzip2 data: unpack it first (bunzip2)",
    b"PK\x03\x04": "a zip archive: unpack it first (unzip)",
    b"PAR1": "a Parquet file: write its rows as JSONL first",
    b"ARROW1": "an Arrow file: write its rows as JSONL first",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        where: ``file:line``; line: from 1.
    """

    where: str
    line: int

    def refused(self, problem: str, field: str | None = None) -> InvalidArgumentError:
        """Returns the error INVALID_DATA that says what is wrong with the row."""
        return refused(self.where, problem, field)


@dataclass(frozen=True)
class TextRow(Row):
    """A text that is learnt from its second token to its end."""

    text: str


@dataclass(frozen=True)
class PromptRow(Row):
    """A prompt, and the completion that is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRow(Row):
    """A conversation, of which turns of the assistant are learnt.

    Attributes:
        messages: mappings with a ``role``, a ``content`` (None beside calls alone), and what else was written.
        learnt: indices of the assistant's messages, without those of weight 0.
        arguments: further variables of the chat template (``chat_template_kwargs``).
    """

    messages: tuple[Mapping[str, Any], ...]
    learnt: tuple[int, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Reads a JSONL file: UTF-8, with or without a byte-order mark, one object per line; only ``\\n`` ends a line.

    Args:
        limit: rows to read; None reads all.

    Raises:
        InvalidArgumentError: INVALID_DATA; the file is not JSONL, a line (which is named) is not a row of a known form,
            or there is none.
    """
    if not path.is_file() and path.exists() and not path.is_dir():
        raise _unreadable(path, "is not a file but a pipe or a device, which can be read only once: write a file first")
    try:
        with path.open("rb") as file:
            numbered = ((number, line) for number, line in _lines(file, path) if line.strip())
            rows = [_row(line, f"{path}:{number}", number) for number, line in islice(numbered, limit)]
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}") from error
    if not rows:
        raise _unreadable(path, "has no rows")
    return rows


def refused(where: str, problem: str, field: str | None = None) -> InvalidArgumentError:
    """Returns the error INVALID_DATA of a row; `where` is ``file:line``."""
    file, _, line = where.rpartition(":")
    metadata = {"row": where, "file": file, "line": line} | ({"field": field} if field else {})
    return InvalidArgumentError(f"{where} {problem}", reason="INVALID_DATA", metadata=metadata)


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    start = file.peek(8)[:8] if hasattr(file, "peek") else b""
    foreign = next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), None)
    if foreign:
        raise _unreadable(path, f"is {foreign}")
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        line = line.removeprefix(_BOM) if number == 1 else line
        if number == 1 and line.lstrip().startswith(b"["):
            raise _unreadable(
                path,
                "begins with [, like a JSON array: one object per line is needed (`jq -c '.[]'` makes that)",
            )
        if len(line) > MAX_LINE_BYTES:
            raise refused(
                f"{path}:{number}", f"is longer than {MAX_LINE_BYTES >> 20} MiB, the most that a row may have"
            )
        yield number, line


def _unreadable(path: Path, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path} {problem}", reason="INVALID_DATA", metadata={"file": str(path)})


def _row(line: bytes, where: str, number: int) -> Row:
    values = _object(line, where)
    forms = [name for name in FORMS if values.get(name) is not None]
    if len(forms) != 1:
        keys = ", ".join(name[:MAX_SHOWN] for name in list(values)[:MAX_SHOWN])
        beside = f" (its keys: {keys})" if keys else ""
        found = f"has neither text, nor prompt and completion, nor messages{beside}"
        found = f"has {' and '.join(forms)}" if forms else found
        raise refused(where, f"{found}: a row has one of text, prompt with completion, or messages")
    form = forms[0]
    _refuse_unread(where, form, values)
    outside = [key for key in OUTSIDE_KEYS if values.get(key)]
    if form == "messages":
        arguments = values.get("chat_template_kwargs") or {}
        if not isinstance(arguments, dict):
            raise refused(where, "has chat_template_kwargs that are not an object", "chat_template_kwargs")
        outside = [key for key in outside if key != "chat_template_kwargs"]
        _refuse_outside(where, outside)
        return _chat(where, number, values["messages"], arguments)
    _refuse_outside(where, outside)
    if form == "text":
        return TextRow(where, number, _text(where, values, "text"))
    return PromptRow(where, number, _text(where, values, "prompt"), _text(where, values, "completion"))


def _refuse_unread(where: str, form: str, values: Mapping[str, Any]) -> None:
    """Refuses a row that would be learnt otherwise than a key of another program's format says."""
    for key in PROMPT_KEYS if form != "text" else ():
        if values.get(key):
            raise refused(
                where,
                f"has {key} beside {form}, which would be left out of the prompt: write it into {form}, or give the "
                "key another name",
                key,
            )
    if values.get("label") is False:
        raise refused(
            where,
            "has label false, which marks an answer that is not wanted, and all answers are learnt: leave the row out",
            "label",
        )
    if values.get("weight") not in (None, 1):
        raise refused(
            where,
            f"has weight {values['weight']!r}, and rows are learnt alike: leave the row out, or the key",
            "weight",
        )


def _refuse_outside(where: str, keys: Sequence[str]) -> None:
    if keys:
        raise refused(
            where,
            f"has {keys[0]}, which Generate cannot send beside messages, so that the trained prompt would never be "
            "served: write the row as prompt and completion, the prompt as the client sends it",
            keys[0],
        )


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise refused(where, f"is not UTF-8 (byte 0x{byte:02x} at {error.start}): save the file as UTF-8") from error
    except RecursionError as error:
        raise refused(where, "is nested too deeply") from error
    except ValueError as error:
        raise refused(where, f"is not valid JSON: {error}; a row is one object on one line") from error
    if not isinstance(values, dict):
        raise refused(where, "is not a JSON object")
    if b"\\ud" in line.lower():  # half of a pair, or a pair
        _check_surrogates(where, values)
    return values


def _check_surrogates(where: str, values: Any, field: str = "") -> None:
    if isinstance(values, str):
        try:
            values.encode("utf-8")
        except UnicodeEncodeError as error:
            raise refused(where, f"has a lone surrogate in {field or 'a key'}, which is not text", field) from error
    elif isinstance(values, list):
        for index, value in enumerate(values):
            _check_surrogates(where, value, f"{field}[{index}]")
    elif isinstance(values, dict):
        for key, value in values.items():
            _check_surrogates(where, key)
            _check_surrogates(where, value, f"{field}.{key}" if field else key)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return values


def _text(where: str, values: Mapping[str, Any], key: str, shown: str | None = None) -> str:
    value, shown = values.get(key), shown or key
    if not isinstance(value, str):
        what = "is missing" if value is None else f"is {_kind(value)}"
        raise refused(where, f"is not a row: {shown} {what}, and text is needed", shown)
    return value


def _kind(value: Any) -> str:
    kinds = {
        str: "a text",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")


def _chat(where: str, number: int, given: Any, arguments: Mapping[str, Any]) -> ChatRow:
    if not isinstance(given, list):
        raise refused(where, f"is not a row: messages is {_kind(given)}, and a list is needed", "messages")
    messages = tuple(_message(where, message, f"messages[{index}]") for index, message in enumerate(given))
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise refused(where, "has no message of the assistant to learn", "messages")
    weighted = {index: _weight(where, message, f"messages[{index}]") for index, message in enumerate(messages)}
    learnt = tuple(index for index in spoken if weighted[index])
    if learnt and learnt[0] == 0:
        raise refused(
            where,
            "begins with a message of the assistant, to which no prompt leads: give it weight 0, so that it is "
            "context only",
            "messages[0]",
        )
    plain = tuple({key: value for key, value in message.items() if key != "weight"} for message in messages)
    return ChatRow(where, number, plain, learnt, dict(arguments))


def _message(where: str, given: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise refused(where, f"has {field}, which is {_kind(given)}: an object with role and content is needed", field)
    # What is null, or an empty list of calls, is not there: a file of columns holds every key in every message.
    given = {key: value for key, value in given.items() if value is not None and not (key in CALL_KEYS and not value)}
    role = _text(where, given, "role", f"{field}.role")
    content = given.get("content")
    if content is None and any(given.get(key) for key in CALL_KEYS):
        return {**given, "role": role, "content": None}
    if isinstance(content, list):
        # As OpenAI-compatible servers hand text parts to a template that takes text.
        content = "\n".join(_part(where, part, f"{field}.content[{i}]") for i, part in enumerate(content))
    return {**given, "role": role, "content": _text(where, {"content": content}, "content", f"{field}.content")}


def _part(where: str, part: Any, field: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        what = f"of type {part.get('type')!r}" if isinstance(part, dict) else _kind(part)
        raise refused(where, f"has {field}, which is {what}: only parts of type 'text' can be learnt", field)
    return _text(where, part, "text", f"{field}.text")


def _weight(where: str, message: Mapping[str, Any], field: str) -> bool:
    for key in LEARNT_KEYS if message["role"] == "assistant" else ():
        if key in message and message[key] is not None and not message[key] and message.get("weight") != 0:
            raise refused(
                where, f"has {field}.{key} {message[key]!r}, which is not read: write weight 0", f"{field}.{key}"
            )
    weight = message.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise refused(where, f"has {field}.weight {weight!r}: it is 0 (context only) or 1", f"{field}.weight")
    if weight and message["role"] != "assistant":
        raise refused(where, f"has {field}.weight 1, but only the assistant's messages are learnt", f"{field}.weight")
    return bool(weight)
