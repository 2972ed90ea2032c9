"""Bounds of structured output by its shape alone, checked in milliseconds, before it is compiled.

How long a grammar takes to compile is bounded elsewhere, where it is compiled; here are its size, its nesting, its
references, and that some finite text satisfies it. Torch-free.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deltamux.errors import InvalidArgumentError

MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 1024
MAX_CHOICES_CHARS = 32_768
MAX_REGEX_CHARS = 4096
MAX_REPETITIONS = 1000
"""Largest number in a regex's ``{n,m}``."""

MAX_SCHEMA_CHARS = 65_536
MAX_DEPTH = 32
"""Levels of objects and lists in a JSON schema."""

MAX_VALUES = 8192
"""Objects, lists, strings and numbers of a JSON schema, all together."""

MAX_PROPERTIES = 256
MAX_ENUM = 1024
MAX_ALTERNATIVES = 64
"""Entries of one ``anyOf``, ``oneOf`` or ``allOf``."""

MAX_COUNT = 1000
"""Of ``minLength``, ``maxLength``, ``minItems`` and the like."""

SCHEMA, REGEX, CHOICE = (f"structured_output.{name}" for name in ("json_schema", "regex", "choice"))

_LENGTHS = {
    "properties": MAX_PROPERTIES,
    "patternProperties": MAX_PROPERTIES,
    "required": MAX_PROPERTIES,
    "$defs": MAX_PROPERTIES,
    "definitions": MAX_PROPERTIES,
    "enum": MAX_ENUM,
    "anyOf": MAX_ALTERNATIVES,
    "oneOf": MAX_ALTERNATIVES,
    "allOf": MAX_ALTERNATIVES,
    "prefixItems": MAX_ALTERNATIVES,
}
_COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains"}
_REPETITION = re.compile(r"\{(\d{1,9}|\d{10,})?(?:,(\d{1,9}|\d{10,})?)?\}")
_SURROGATE = re.compile(
    r"(?:^|[^\\])(?:\\\\)*\\(?:u|U0000|u\{0*(?=[0-9a-fA-F]{4}\}))[dD][89a-fA-F][0-9a-fA-F]{2}",
)
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values hold subschemas by name: a keyword among these is a name."""

_MEMBERS = ("properties", "patternProperties")
_UNNAMED = ("additionalProperties", "unevaluatedProperties")

_DATA = ("enum", "const", "default", "examples")
"""Keywords whose values are data: a keyword among these is none."""


def check_choice(options: Sequence[str]) -> None:
    """Raises InvalidArgumentError; so do the others here, naming the field and what is wrong in it."""
    if len(options) > MAX_CHOICES:
        raise invalid(CHOICE, f"has {len(options)} options; at most {MAX_CHOICES} are taken")
    if not all(options):
        raise invalid(CHOICE, "has an empty option")
    if max(map(len, options)) > MAX_CHOICE_CHARS:
        raise invalid(CHOICE, f"has an option of more than {MAX_CHOICE_CHARS} characters")
    if sum(map(len, options)) > MAX_CHOICES_CHARS:
        raise invalid(CHOICE, f"has options of more than {MAX_CHOICES_CHARS} characters together")


def check_regex(pattern: str, field: str = REGEX) -> None:
    if len(pattern) > MAX_REGEX_CHARS:
        raise invalid(field, f"has {len(pattern)} characters; at most {MAX_REGEX_CHARS} are taken")
    if "\0" in pattern:
        raise invalid(field, "has a NUL character")
    if _SURROGATE.search(pattern):
        raise invalid(field, "has half of a surrogate pair, which is no text: write the character itself")
    for bounds in _REPETITION.finditer(pattern):
        if any(number and (len(number) > 9 or int(number) > MAX_REPETITIONS) for number in bounds.groups()):
            raise invalid(field, f"repeats {bounds[0][:40]}; at most {MAX_REPETITIONS} times are taken")


def check_schema(text: str) -> None:
    if len(text) > MAX_SCHEMA_CHARS:
        raise invalid(SCHEMA, f"has {len(text)} characters; at most {MAX_SCHEMA_CHARS} are taken")
    try:
        schema = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise invalid(SCHEMA, f"is not valid JSON: {str(error)[:200] or 'nested too deeply'}") from error
    if not isinstance(schema, dict):
        raise invalid(SCHEMA, f"must be a JSON object, not {type(schema).__name__}")
    _check_size(schema)
    _Schema(schema).check()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a value of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object; of a key that comes twice, JSON's readers take the one or the other."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key in made if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"an object has the key {twice[:80]!r} twice")
    return made


def invalid(field: str, problem: str, reason: str = "INVALID_GRAMMAR") -> InvalidArgumentError:
    return InvalidArgumentError(f"{field} {problem}", reason=reason, metadata={"field": f"sampling.{field}"})


def target_of(root: Any, reference: Any) -> Any:
    """Returns what a ``$ref`` points at; raises InvalidArgumentError if it leaves the schema or points at nothing."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise invalid(SCHEMA, f"refers to {str(reference)[:80]!r}; only references within the schema (#/...) are taken")
    target = root
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and key.isdecimal() and len(key) < 5 and int(key) < len(target):
            target = target[int(key)]
        elif isinstance(target, dict) and key in target:
            target = target[key]
        else:
            raise invalid(SCHEMA, f"refers to {reference[:80]!r}, which it does not have")
    return target


def _check_size(schema: Any) -> None:
    """Walks without recursion, so that no nesting can exhaust the stack."""
    count, pending = 0, [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise invalid(SCHEMA, f"is nested more than {MAX_DEPTH} levels deep")
        if count + len(pending) > MAX_VALUES:
            raise invalid(SCHEMA, f"has more than {MAX_VALUES} values")
        if isinstance(value, dict):
            pending.extend((child, depth + 1) for child in value.values())
        elif isinstance(value, list):
            pending.extend((child, depth + 1) for child in value)


class _Schema:
    """A schema of bounded size; its subschemas are distinguished by identity."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._all = dict(_subschemas(root, "#"))

    def check(self) -> None:
        for path, node in self._all.items():
            self._check_lengths(path, node)
            if "$ref" in node:
                self._target(node)
        if not self._finite(self._root):
            raise invalid(
                SCHEMA,
                "has a reference to itself that never ends: no finite text satisfies it; make the cycle optional",
            )

    def _check_lengths(self, path: str, node: Mapping[str, Any]) -> None:
        for name in node.keys() & _LENGTHS.keys():
            value, limit = node[name], _LENGTHS[name]
            if isinstance(value, (dict, list)) and len(value) > limit:
                raise invalid(SCHEMA, f"has {len(value)} entries at {path}/{name}; at most {limit} are taken"[:300])
        for name in node.keys() & _COUNTS:
            value = node[name]
            if isinstance(value, (int, float)) and not 0 <= value <= MAX_COUNT:
                raise invalid(SCHEMA, f"has {path}/{name} outside 0 to {MAX_COUNT}"[:300])
        patterns = node.get("patternProperties", ())
        for pattern in (node.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
            if isinstance(pattern, str):
                check_regex(pattern, SCHEMA)

    def _target(self, node: Mapping[str, Any]) -> Any:
        return target_of(self._root, node["$ref"])

    def _finite(self, root: Any) -> bool:
        """Returns whether some finite text satisfies a schema: the least fixed point over its subschemas."""
        finite: set[int] = set()
        blocked: dict[int, list[dict[str, Any]]] = {}  # by what each waits for
        pending = [*self._all.values()]  # the last ones are the innermost, and go first
        while pending:
            node = pending.pop()

            def known(other: Any, node: dict[str, Any] = node) -> bool:
                if not isinstance(other, dict) or id(other) in finite:
                    return True
                blocked.setdefault(id(other), []).append(node)
                return False

            if id(node) not in finite and self._ends(node, known):
                finite.add(id(node))
                pending.extend(blocked.pop(id(node), ()))
        return id(root) in finite

    def _ends(self, node: Mapping[str, Any], finite: Callable[[Any], bool]) -> bool:
        if "$ref" in node and not finite(self._target(node)):
            return False
        for name, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
            branches = node.get(name)
            if isinstance(branches, list) and branches and not enough(map(finite, branches)):
                return False
        kind = node.get("type")
        if isinstance(kind, list) and set(map(str, kind)) - {"object", "array"}:
            return True
        properties, required = node.get("properties"), node.get("required")
        if isinstance(properties, dict) and isinstance(required, list):
            needed = [properties[name] for name in required if isinstance(name, str) and name in properties]
            if not all(map(finite, needed)):
                return False
        if not self._members_end(node, finite):
            return False
        minimum = node.get("minItems", 0)
        if isinstance(minimum, int) and minimum > 0:
            first = node.get("prefixItems")
            items = first[:minimum] if isinstance(first, list) else []
            rest = node.get("items")
            return all(map(finite, [*items, *([rest] if rest is not None and len(items) < minimum else [])]))
        return True

    @staticmethod
    def _members_end(node: Mapping[str, Any], finite: Callable[[Any], bool]) -> bool:
        """Returns whether as many members as an object must have can be finite."""
        least = node.get("minProperties", 0)
        named, by_pattern = (
            [*children.values()] if isinstance(children := node.get(name), dict) else [] for name in _MEMBERS
        )
        unnamed = by_pattern + [node[name] for name in _UNNAMED if node.get(name, False) is not False]
        if not (isinstance(least, int) and least > 0 and named + unnamed):
            return True
        return any([*map(finite, unnamed)]) or sum(map(finite, named)) >= least


def _subschemas(root: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every object of a schema that may be a subschema, with its path; outer ones first."""
    pending: list[tuple[str, Any]] = [(path, root)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            yield path, value
            pending.extend(_within(path, value))
        elif isinstance(value, list):
            pending.extend((f"{path}/{index}", child) for index, child in enumerate(value))


def _within(path: str, node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, child in node.items():
        below = f"{path}/{name[:40]}"
        if name in _BY_NAME and isinstance(child, dict):
            yield from ((f"{below}/{key[:40]}", schema) for key, schema in child.items())
        elif name not in _DATA:
            yield below, child
