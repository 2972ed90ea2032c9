"""Builds a method's config from the values of a file: every key known, every value of its field's type.

Types are checked as JSON has them, and nothing is converted silently: ``"no"`` is not a boolean, ``"16"`` is not a
number, and an integer is valid for a float.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from deltamux.errors import InvalidConfigError, listed
from deltamux.patterns import begin_config

PEFT_READ = (0, 21)
"""The newest PEFT whose files are read."""

NOTHING: Mapping[str, str] = MappingProxyType({})


def build_config(
    config_class: Any,
    values: Mapping[str, Any],
    *,
    ignored: frozenset[str],
    method: str,
    refused: Mapping[str, str] = NOTHING,
    needed: Collection[str] = (),
) -> Any:
    """Returns an instance of a frozen dataclass; null is a value only of fields with None in their type.

    A field whose type is a dataclass is built from a mapping in the same way.

    Args:
        ignored: keys that change nothing.
        refused: keys that cannot be served, with the reason.
        needed: keys that a file must give a value to, whatever training's default.

    Raises:
        InvalidConfigError: unknown keys (all of them named), a value of another type, or out of range.
    """
    begin_config()
    _check_keys(config_class, values, ignored, method, refused)
    hints = _hints(config_class)
    given = {key: value for key, value in values.items() if key in hints}
    _check_nulls(config_class, given, method, needed)
    try:
        return config_class(**{key: _typed(key, value, hints[key], method) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise InvalidConfigError(f"method {method!r}: {error}", metadata={"method": method}) from error


def _check_nulls(config_class: Any, given: Mapping[str, Any], method: str, needed: Collection[str]) -> None:
    """Raises InvalidConfigError for a null where a value is needed: it does not mean the default."""
    for field in dataclasses.fields(config_class):
        if field.name in given and given[field.name] is None and not _takes_none(_hints(config_class)[field.name]):
            has_value = field.default is not dataclasses.MISSING
            default = f", or leave the key out for {field.default!r}" if has_value else ", or leave the key out"
            missing, default = ("null or left out", "") if field.name in needed else ("null", default)
            raise InvalidConfigError(
                f"method {method!r}: {field.name} is {missing}, but needs a value: give one{default}",
                metadata={"field": field.name, "method": method},
            )


def _takes_none(hint: Any) -> bool:
    return hint in (Any, None) or type(None) in get_args(hint)


def _check_keys(
    config_class: Any, values: Mapping[str, Any], ignored: frozenset[str], method: str, refused: Mapping[str, str]
) -> None:
    fields = {field.name for field in dataclasses.fields(config_class)}
    # In a file, a key that is null, false or empty changes nothing, whatever a newer library may mean by it. Elsewhere
    # a user has written it, and may have misspelled an option that is on by default.
    unset = {key for key, value in values.items() if value in (None, False, "", [], {})}
    passed = unset if "peft_type" in values else unset & refused.keys()
    unknown = sorted(values.keys() - passed - fields - ignored)
    for key in unknown:
        if key in refused:
            shown = f"{values[key]!r:.80}"
            raise InvalidConfigError(
                f"method {method!r} is not served with {key} ({shown}): {refused[key]}",
                metadata={"field": key, "method": method},
            )
    if unknown:
        wrong = listed(f"{key[:80]!r}" for key in unknown)
        raise InvalidConfigError(
            f"method {method!r} has no option {wrong}; it has: {', '.join(sorted(fields))}{_origin(values)}",
            metadata={"field": unknown[0], "method": method},
        )


def _origin(values: Mapping[str, Any]) -> str:
    """Returns what to do about unknown keys in an adapter's file; "" for other configs."""
    if "peft_type" not in values:
        return ""
    written = str(values.get("peft_version") or "")
    found = re.match(r"(\d+)\.(\d+)", written)
    if found and (int(found[1]), int(found[2])) > PEFT_READ:
        newest = ".".join(map(str, PEFT_READ))
        return (
            f". The file was written by PEFT {written[:40]}, and a PEFT newer than {newest}, whose files are the newest"
            f" that are read, brought the key. Save the adapter with PEFT {newest}, or train without the option"
        )
    return (
        ". No PEFT that is read here has it: where it is a note that changes nothing, delete it from "
        "adapter_config.json"
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
    raise TypeError(f"{type(value).__name__} is not a value of JSON")


@cache
def _hints(config_class: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: hint for name, hint in get_type_hints(config_class).items() if name in names}


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)
