"""Builds a method's config from the values of a file: every key known, every value of its field's type.

Types are checked as JSON has them, and nothing is converted behind the user's back: ``"no"`` is no boolean, ``"16"`` no
number, and an integer stands for a float.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

from deltamux.errors import InvalidConfigError


def build_config(config_class: Any, values: Mapping[str, Any], *, ignored: frozenset[str], method: str) -> Any:
    """Returns an instance of a frozen dataclass; null stands for a field's default.

    A field whose type is a dataclass is built from a mapping in the same way.

    Raises:
        InvalidConfigError: unknown keys (all of them named), a value of another type, or out of range.
    """
    _check_keys(config_class, values, ignored, method)
    hints = _hints(config_class)
    given = {key: value for key, value in values.items() if key in hints and value is not None}
    try:
        return config_class(**{key: _typed(key, value, hints[key], method) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise InvalidConfigError(f"method {method!r}: {error}", metadata={"method": method}) from error


def _check_keys(config_class: Any, values: Mapping[str, Any], ignored: frozenset[str], method: str) -> None:
    fields = {field.name for field in dataclasses.fields(config_class)}
    # A key that is null, false or empty changes nothing, whatever a newer library may mean by it.
    given = {key for key, value in values.items() if value not in (None, False, "", [], {})}
    unknown = sorted(given - fields - ignored)
    if unknown:
        raise InvalidConfigError(
            f"method {method!r} has no option {', '.join(map(repr, unknown))}; it has: {', '.join(sorted(fields))}",
            metadata={"field": unknown[0], "method": method},
        )


def _typed(key: str, value: Any, hint: Any, method: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build_config(hint, value, ignored=frozenset(), method=f"{method}.{key}")
    from pydantic import ValidationError

    try:
        text = json.dumps(value, allow_nan=False, default=_plain)
        return _adapter(hint).validate_json(text, strict=True)
    except (TypeError, ValueError, RecursionError) as error:
        problem = error.errors()[0]["msg"].lower() if isinstance(error, ValidationError) else str(error)
        raise InvalidConfigError(
            f"method {method!r}: {key} is {value!r:.80}, but {problem}", metadata={"field": key, "method": method}
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is no value of JSON")


@cache
def _hints(config_class: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: hint for name, hint in get_type_hints(config_class).items() if name in names}


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)
