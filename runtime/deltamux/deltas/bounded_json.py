"""JSON of files that are not trusted: depth, size and the length of numbers are checked before a value is made."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_NAME = 80
"""Characters of a key that a message repeats."""

_STRING = r'"(?:[^"\\]++|\\.)*+(?:"|\Z)'
_STRINGS = re.compile(_STRING, re.DOTALL)
_NO_BRACKETS = re.compile(r"[^\[\]{}]++")
_NOT_NATURAL = re.compile(r'[^\s"\[\]{},:0-9]')
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOKENS = re.compile(
    rf'(?:(?P<string>{_STRING})(?P<key>\s*+:)?|(?P<open>[\[{{])|(?P<close>[\]}}])|(?P<literal>[^\s"\[\]{{}},:]++))[\s,:]*+',
    re.DOTALL,
)
"""Every part of these takes all it can and gives nothing back, so that a search is linear in the text."""


class Bounds(NamedTuple):
    """The bounds of a text."""

    depth: int  # objects and arrays inside each other
    values: int  # how many follow another (commas) altogether
    literal: int = 32  # characters of a number
    entries: int = sys.maxsize  # of one object or array inside the outermost one
    natural: bool = False  # whether numbers are digits alone, and true, false and null do not occur


class JSONRefusedError(ValueError):
    """The text is not valid JSON, or beyond its bounds.

    Attributes:
        entry: key of the outermost object under which the problem is; "" where it is under none.
    """

    def __init__(self, problem: str, entry: str = "") -> None:
        super().__init__(f"{problem} (under {entry[:MAX_NAME]!r})" if entry else problem)
        self.entry = entry


def parse_object(raw: bytes, bounds: Bounds) -> dict[str, Any]:
    """Returns the object that a text in UTF-8 holds.

    Raises:
        JSONRefusedError: it is not valid JSON (NaN and Infinity are not), is not an object, exceeds a bound, repeats a
            key, or holds text that is not valid Unicode or a number that no float can hold.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JSONRefusedError(f"byte {error.start} is not valid UTF-8") from None
    if not _within(text, bounds):
        _find_excess(text, bounds)
    objects = _Objects()
    try:
        values = json.loads(text, object_pairs_hook=objects.made, parse_constant=_no_constant, parse_float=_finite)
    except JSONRefusedError:
        raise
    except (ValueError, RecursionError) as error:
        raise JSONRefusedError(f"it is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise JSONRefusedError("it is not a JSON object")
    if objects.repeating or _SURROGATE.search(text):
        _check_texts(values)
    if bounds.entries < sys.maxsize:
        _check_entries(values, bounds.entries)
    return values


def _within(text: str, bounds: Bounds) -> bool:
    """Whether a text keeps the bounds, by searches that run at the speed of C; a text that is not valid may pass."""
    bare = _STRINGS.sub('""', text)
    brackets = _NO_BRACKETS.sub("", bare)
    if bare.count(",") > bounds.values:
        raise JSONRefusedError(f"it has more than {bounds.values} values")
    for _ in range(bounds.depth):
        brackets = brackets.replace("[]", "").replace("{}", "")
    too_long = re.search(rf'[^\s"\[\]{{}},:]{{{bounds.literal + 1}}}', bare)
    return not (brackets or too_long or (bounds.natural and _NOT_NATURAL.search(bare)))


def _find_excess(text: str, bounds: Bounds) -> None:
    """Raises JSONRefusedError for the first place beyond the bounds, if there is one, and names its entry."""
    depth = 0
    entry = ""
    for token in _TOKENS.finditer(text):
        kind = token.lastgroup
        if kind == "open":
            depth += 1
            if depth > bounds.depth:
                raise JSONRefusedError(f"it is nested more than {bounds.depth} deep", entry)
        elif kind == "close":
            depth -= 1
        elif kind == "literal":
            _check_literal(token["literal"], bounds, entry)
        elif kind == "key" and depth == 1:
            entry = token["string"][1 : MAX_NAME + 1].removesuffix('"')


def _check_literal(text: str, bounds: Bounds, entry: str) -> None:
    if len(text) > bounds.literal:
        raise JSONRefusedError(
            f"{text[:16]}... has {len(text)} characters; numbers have at most {bounds.literal}", entry
        )
    if bounds.natural and not text.isdecimal():
        raise JSONRefusedError(f"{text} is not a whole number from 0 on", entry)


class _Repeating(dict[str, Any]):
    """An object in whose text a key occurs twice."""

    def __init__(self, values: dict[str, Any], key: str) -> None:
        super().__init__(values)
        self.key = key


class _Objects:
    """Makes the objects of one text; `repeating` is whether a key of one occurs twice."""

    def __init__(self) -> None:
        self.repeating = False

    def made(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) == len(pairs):
            return values
        self.repeating = True
        counts = Counter(key for key, _ in pairs)
        return _Repeating(values, counts.most_common(1)[0][0])


def _check_texts(values: dict[str, Any]) -> None:
    if isinstance(values, _Repeating):
        raise JSONRefusedError(f"key {values.key[:MAX_NAME]!r} occurs twice", values.key)
    for entry, value in values.items():
        for inner in _walk(value):
            if isinstance(inner, _Repeating):
                raise JSONRefusedError(f"key {inner.key[:MAX_NAME]!r} occurs twice", entry)
            if isinstance(inner, str) and not _is_unicode(inner):
                raise JSONRefusedError("it holds half of a surrogate pair, which is not valid Unicode", entry)
        if not _is_unicode(entry):
            raise JSONRefusedError("a key holds half of a surrogate pair, which is not valid Unicode", ascii(entry))


def _check_entries(values: dict[str, Any], most: int) -> None:
    for entry, value in values.items():
        for inner in _walk(value):
            if isinstance(inner, dict | list) and len(inner) > most:
                raise JSONRefusedError(f"a list or an object has {len(inner)} entries; at most {most} are read", entry)


def _walk(value: Any) -> Iterator[Any]:
    """Yields a value, and the values and keys that it holds; its depth is bounded by now."""
    yield value
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _walk(inner)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> Any:
    raise JSONRefusedError(f"it holds {name}, which is not valid JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise JSONRefusedError(f"{text} is beyond what a float holds")
    return value
