"""Rows of JSONL files: texts, prompts with completions, or conversations; docs/data.md describes them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from deltamux.errors import InvalidArgumentError

MAX_LINE_BYTES = 16 * 1024**2
"""Bytes of one row at most."""

MAX_SHOWN = 20
"""Keys of a row that an error lists at most, and characters of each."""

FORMS = ("text", "prompt", "messages")
UNSENDABLE_KEYS = ("tools", "functions", "function_call", "documents", "chat_template_kwargs")
"""Keys of a row that change its prompt, and that `Generate` cannot send."""
PROMPT_KEYS = ("system", "system_prompt", "history")
"""Keys that hold a part of the prompt in other libraries' rows."""
LOSS_KEYS = ("train", "training", "trainable", "loss")
"""Keys that exclude a message from the loss in other libraries' rows; here, `weight` does."""
CALL_KEYS = ("tool_calls", "function_call")

_MAGIC = {
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
        where: ``file:line``.
        line: its number, from 1.
    """

    where: str
    line: int

    def error(self, problem: str, field: str | None = None) -> InvalidArgumentError:
        """Returns the error INVALID_DATA with a problem of the row."""
        return row_error(self.where, problem, field)


@dataclass(frozen=True)
class TextRow(Row):
    """A text, learnt from its second token to its end."""

    text: str


@dataclass(frozen=True)
class PromptRow(Row):
    """A prompt, and a completion that is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRow(Row):
    """A conversation, of which the assistant's turns are learnt.

    Attributes:
        messages: mappings with a ``role``, a ``content`` (None: only calls), and the other keys of the file.
        learnt_turns: indices of the assistant's messages, without those of weight 0.
        chat_template_kwargs: further variables of the chat template.
    """

    messages: tuple[Mapping[str, Any], ...]
    learnt_turns: tuple[int, ...]
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Reads a JSONL file: UTF-8, with or without a byte-order mark, one object per line; only ``\\n`` ends a line.

    Args:
        limit: rows to read; None reads all.

    Raises:
        InvalidArgumentError: INVALID_DATA; the file is not JSONL, a line is not a row of a known form, or none is.
    """
    if not path.is_file() and path.exists() and not path.is_dir():
        raise _file_error(path, "is not a file but a pipe or a device, which can be read only once: write a file first")
    try:
        with path.open("rb") as file:
            numbered = ((number, line) for number, line in _lines(file, path) if line.strip())
            rows = [_row(line, f"{path}:{number}", number) for number, line in islice(numbered, limit)]
    except OSError as error:
        raise _file_error(path, f"cannot be read: {error.strerror}") from error
    if not rows:
        raise _file_error(path, "has no rows")
    return rows


def row_error(where: str, problem: str, field: str | None = None) -> InvalidArgumentError:
    """Returns the error INVALID_DATA with a problem of the row at ``file:line``."""
    file, _, line = where.rpartition(":")
    metadata = {"row": where, "file": file, "line": line} | ({"field": field} if field else {})
    return InvalidArgumentError(f"{where} {problem}", reason="INVALID_DATA", metadata=metadata)


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    start = file.peek(8)[:8] if hasattr(file, "peek") else b""
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if kind:
        raise _file_error(path, f"is {kind}")
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        line = line.removeprefix(_BOM) if number == 1 else line
        if number == 1 and line.lstrip().startswith(b"["):
            raise _file_error(
                path, "begins with [, like a JSON array: one object per line is needed (`jq -c '.[]'` makes that)"
            )
        if len(line) > MAX_LINE_BYTES:
            raise row_error(
                f"{path}:{number}", f"is longer than {MAX_LINE_BYTES >> 20} MiB, the most that a row may have"
            )
        yield number, line


def _file_error(path: Path, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path} {problem}", reason="INVALID_DATA", metadata={"file": str(path)})


def _row(line: bytes, where: str, number: int) -> Row:
    values = _object(line, where)
    forms = [name for name in FORMS if values.get(name) is not None]
    if len(forms) != 1:
        keys = ", ".join(name[:MAX_SHOWN] for name in list(values)[:MAX_SHOWN])
        shown = f" (its keys: {keys})" if keys else ""
        found = f"has neither text, nor prompt and completion, nor messages{shown}"
        found = f"has {' and '.join(forms)}" if forms else found
        raise row_error(where, f"{found}: a row has one of text, prompt with completion, or messages")
    form = forms[0]
    _check_foreign_keys(where, form, values)
    unsendable = [key for key in UNSENDABLE_KEYS if values.get(key)]
    if form == "messages":
        kwargs = values.get("chat_template_kwargs") or {}
        if not isinstance(kwargs, dict):
            raise row_error(where, "has chat_template_kwargs that are not an object", "chat_template_kwargs")
        _check_unsendable(where, [key for key in unsendable if key != "chat_template_kwargs"])
        return _chat(where, number, values["messages"], kwargs)
    _check_unsendable(where, unsendable)
    if form == "text":
        return TextRow(where, number, _text(where, values, "text"))
    return PromptRow(where, number, _text(where, values, "prompt"), _text(where, values, "completion"))


def _check_foreign_keys(where: str, form: str, values: Mapping[str, Any]) -> None:
    """Refuses a row with a key that means something in another library's format, and nothing here."""
    for key in PROMPT_KEYS if form != "text" else ():
        if values.get(key):
            raise row_error(
                where,
                f"has {key} next to {form}, which would be left out of the prompt: write it into {form}, or give the "
                "key another name",
                key,
            )
    if values.get("label") is False:
        raise row_error(
            where,
            "has label false, which marks an answer that is not wanted, and all answers are learnt: leave the row out",
            "label",
        )
    if values.get("weight") not in (None, 1):
        raise row_error(
            where,
            f"has weight {values['weight']!r}, and rows are learnt alike: leave the row out, or the key",
            "weight",
        )


def _check_unsendable(where: str, keys: Sequence[str]) -> None:
    if keys:
        raise row_error(
            where,
            f"has {keys[0]}, which Generate cannot send next to messages, so that the trained prompt would never be "
            "served: write the row as prompt and completion, the prompt as the client sends it",
            keys[0],
        )


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise row_error(where, f"is not UTF-8 (byte 0x{byte:02x} at {error.start}): save the file as UTF-8") from error
    except RecursionError as error:
        raise row_error(where, "is nested too deeply") from error
    except ValueError as error:
        raise row_error(where, f"is not valid JSON: {error}; a row is one object on one line") from error
    if not isinstance(values, dict):
        raise row_error(where, "is not a JSON object")
    if b"\\ud" in line.lower():  # a surrogate, or a pair of them
        _check_surrogates(where, values)
    return values


def _check_surrogates(where: str, values: Any, field: str = "") -> None:
    if isinstance(values, str):
        try:
            values.encode("utf-8")
        except UnicodeEncodeError as error:
            raise row_error(where, f"has a lone surrogate in {field or 'a key'}, which is not text", field) from error
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
        raise row_error(where, f"is not a row: {shown} {what}, and text is needed", shown)
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


def _chat(where: str, number: int, given: Any, template_kwargs: Mapping[str, Any]) -> ChatRow:
    if not isinstance(given, list):
        raise row_error(where, f"is not a row: messages is {_kind(given)}, and a list is needed", "messages")
    messages = tuple(_message(where, message, f"messages[{index}]") for index, message in enumerate(given))
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise row_error(where, "has no message of the assistant to learn", "messages")
    weighted = {index: _weight(where, message, f"messages[{index}]") for index, message in enumerate(messages)}
    learnt = tuple(index for index in turns if weighted[index])
    if learnt and learnt[0] == 0:
        raise row_error(
            where,
            "begins with a message of the assistant, to which no prompt leads: give it weight 0, so that it is "
            "context only",
            "messages[0]",
        )
    plain = tuple({key: value for key, value in message.items() if key != "weight"} for message in messages)
    return ChatRow(where, number, plain, learnt, dict(template_kwargs))


def _message(where: str, given: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise row_error(
            where, f"has {field}, which is {_kind(given)}: an object with role and content is needed", field
        )
    # A key that is null, or an empty list of calls, is left out: a columnar file has every key in every message.
    given = {key: value for key, value in given.items() if value is not None and not (key in CALL_KEYS and not value)}
    role = _text(where, given, "role", f"{field}.role")
    content = given.get("content")
    if content is None and any(given.get(key) for key in CALL_KEYS):
        return {**given, "role": role, "content": None}
    if isinstance(content, list):
        # As OpenAI-compatible servers join text parts for a template that takes text.
        content = "\n".join(_part(where, part, f"{field}.content[{i}]") for i, part in enumerate(content))
    return {**given, "role": role, "content": _text(where, {"content": content}, "content", f"{field}.content")}


def _part(where: str, part: Any, field: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        what = f"of type {part.get('type')!r}" if isinstance(part, dict) else _kind(part)
        raise row_error(where, f"has {field}, which is {what}: only parts of type 'text' can be learnt", field)
    return _text(where, part, "text", f"{field}.text")


def _weight(where: str, message: Mapping[str, Any], field: str) -> bool:
    for key in LOSS_KEYS if message["role"] == "assistant" else ():
        if key in message and message[key] is not None and not message[key] and message.get("weight") != 0:
            raise row_error(
                where, f"has {field}.{key} {message[key]!r}, which is not read: write weight 0", f"{field}.{key}"
            )
    weight = message.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise row_error(where, f"has {field}.weight {weight!r}: it is 0 (context only) or 1", f"{field}.weight")
    if weight and message["role"] != "assistant":
        raise row_error(where, f"has {field}.weight 1, but only the assistant's messages are learnt", f"{field}.weight")
    return bool(weight)
