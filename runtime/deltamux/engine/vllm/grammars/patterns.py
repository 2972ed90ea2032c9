"""Patterns of strings in JSON schemas: what they match, xgrammar writes as it is, without JSON's escapes."""

import re

from deltamux.engine.grammar_bounds import SCHEMA, invalid

_TOKEN = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]+\}|U[0-9a-fA-F]{8}|c.|.)|\[(?:\\.|[^\]\\])*\]|.", re.DOTALL
)
_CONTROL_ESCAPES = frozenset("nrtfv0abe")


def check_pattern(pattern: str, path: str) -> None:
    r"""Refuses a pattern that matches a quotation mark, a backslash or a control character by name.

    In a class with others such a character is left out of the grammar, which is narrow, but right; ``\s`` is a space.
    """
    if any(map(_nothing_else, _TOKEN.findall(pattern))):
        raise invalid(
            SCHEMA,
            f"has a constraint that the output cannot be held to: {path[-120:]} matches a quotation mark, a backslash "
            "or a control character, which JSON writes with a backslash in front",
        )


def _nothing_else(token: str) -> bool:
    """Returns whether a part of a pattern matches nothing but what JSON escapes; a range is judged by its ends."""
    if not token.startswith("["):
        return _must_be_escaped(token)
    members = [member for member in _TOKEN.findall(token[1:-1]) if member != "-"]
    return bool(members) and all(map(_must_be_escaped, members))


def _must_be_escaped(token: str) -> bool:
    if len(token) == 1:
        return token == '"' or token < " "
    kind, digits = token[1], token[2:].strip("{}")
    if kind in "xuU" and digits:
        return int(digits, 16) < 0x20 or chr(min(int(digits, 16), 0x7F)) in '"\\'
    return kind in '\\"' or kind in _CONTROL_ESCAPES or (kind == "c" and bool(digits))
