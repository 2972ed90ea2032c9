"""The part of JSON Schema that xgrammar enforces; the rest, which it would silently ignore, is refused.

xgrammar reads one form of a subschema, the first of ``$ref``, ``const``, ``enum``, ``anyOf``, ``oneOf``, ``allOf`` and
``type``, and none of the others in it. Checked against xgrammar 0.2.8. Torch-free.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from deltamux.engine.grammar_bounds import SCHEMA, invalid, target_of
from deltamux.engine.vllm.grammars.patterns import check_pattern

FORMS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""Keywords of which the first that a subschema has is all that is read of it."""

OF_TYPE: Mapping[str, frozenset[str]] = {
    "object": frozenset(
        [
            "properties",
            "patternProperties",
            "additionalProperties",
            "unevaluatedProperties",
            "propertyNames",
            "required",
            "minProperties",
            "maxProperties",
        ]
    ),
    "array": frozenset(["items", "prefixItems", "additionalItems", "unevaluatedItems", "minItems", "maxItems"]),
    "string": frozenset(["pattern", "format", "minLength", "maxLength"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
}
"""Keywords that are read where the type is given, and say nothing about values of other types."""

UNSUPPORTED = frozenset(
    [
        "not", "if", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef",
        "contains", "minContains", "maxContains", "uniqueItems", "multipleOf",
    ]
)  # fmt: skip
IMPLIED = {
    "object": ("properties", "additionalProperties", "unevaluatedProperties"),
    "array": ("items", "prefixItems", "unevaluatedItems"),
}
"""Keywords that make xgrammar take a subschema without a type for one of this type."""

LENGTHS = ("minLength", "maxLength")
MAX_PATTERN_CHARS = 2000
"""Characters of a schema's strings, all together, whose lengths are written as patterns: 0.4 ms of compiling each."""

FORMATS = ["date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time"]
FORMATS += ["uri", "uri-reference", "uri-template", "uuid"]
"""xgrammar's, without those whose grammars let control characters into strings, which JSON forbids there."""

NAMELESS = frozenset(
    ["title", "default", "description", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"]
)
"""Keys that xgrammar leaves out when it compares subschemas, be they keywords, or names of properties."""

CONSTRAINTS = frozenset(FORMS).union({"type"}, UNSUPPORTED, *OF_TYPE.values())
_MAPS = ("properties", "patternProperties")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_ONE = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames")


def honoured(text: str) -> str:
    """Returns a schema as xgrammar reads it right; equal in meaning, apart from what implied types rule out.

    Args:
        text: a schema that `grammar_bounds.check_schema` has let pass.
    Raises:
        InvalidArgumentError: part of it would be ignored; the message names the place and the keyword.
    """
    schema: dict[str, Any] = json.loads(text)
    _check_numbers(schema)
    _Reader(schema).read()
    rewritten = json.dumps(schema, ensure_ascii=False)
    try:
        rewritten.encode()
    except UnicodeEncodeError:
        raise invalid(SCHEMA, "has half of a surrogate pair, which is no text") from None
    return rewritten


class _Reader:
    """Walks what is reachable from the root as xgrammar does, and completes it in place."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._room = MAX_PATTERN_CHARS

    def read(self) -> None:
        pending: list[tuple[str, Any, bool]] = [("#", self._root, False)]
        seen: set[int] = set()
        while pending:
            path, node, is_name = pending.pop()
            if isinstance(node, dict) and id(node) not in seen:
                seen.add(id(node))
                self._check(path, node, is_name)
                pending.extend(self._below(path, node))
                if _nameless(node):
                    node["x-at"] = len(seen)

    def _below(self, path: str, node: dict[str, Any]) -> Iterator[tuple[str, Any, bool]]:
        if "$ref" in node:
            yield str(node["$ref"])[:120], target_of(self._root, node["$ref"]), False
        for name in _MAPS:
            children = node.get(name)
            if isinstance(children, dict):
                yield from ((f"{path}/{name}/{key[:40]}", child, False) for key, child in children.items())
        for name in _LISTS:
            children = node.get(name)
            if isinstance(children, list):
                yield from ((f"{path}/{name}/{index}", child, False) for index, child in enumerate(children))
        for name in _ONE:
            if name in node:
                yield f"{path}/{name}", node[name], name == "propertyNames"

    def _check(self, path: str, node: dict[str, Any], is_name: bool) -> None:
        given = node.keys() & CONSTRAINTS
        for name in sorted(given & UNSUPPORTED):
            if node[name] is not False or name != "uniqueItems":
                raise _refused(path, name, "is not supported")
        if is_name and (given & set(FORMS) or "type" in given) and self._kinds(node) != {"string"}:
            raise _refused(path, min(given), "allows names that are not strings")
        form = next((name for name in FORMS if name in given), None)
        if form is not None:
            self._check_form(path, node, form, given - {form})
            return
        if "type" not in node and (implied := "string" if is_name else _implied(node)):
            node["type"] = implied
        kind = node.get("type")
        if kind is None and given:
            raise _refused(path, min(given), "has no effect without a type: give the subschema its type")
        if kind == []:
            raise _refused(path, "type", "is empty")
        kinds = kind if isinstance(kind, list) else [kind]
        if "object" in kinds:
            _check_object(path, node)
        if "string" in kinds:
            _check_string(path, node)
            self._write_lengths(node)
        if "number" in kinds:
            _check_number(path, node)

    def _write_lengths(self, node: dict[str, Any]) -> None:
        """Writes a string's lengths as a pattern: with lengths xgrammar allows control characters as they are."""
        least, most = node.get("minLength", 0), node.get("maxLength")
        if type(least) is not int or not (most is None or (type(most) is int and least <= most)):
            return  # xgrammar's error has the reason
        cost = least if most is None else most
        if node.keys() & LENGTHS and not node.keys() & {"pattern", "format"} and cost <= self._room:
            self._room -= cost
            for name in LENGTHS:
                node.pop(name, None)
            if cost or most is not None:
                node["pattern"] = f"^.{{{least},{'' if most is None else most}}}$"

    def _check_form(self, path: str, node: dict[str, Any], form: str, others: set[str]) -> None:
        """Refuses further constraints in a subschema that has a form, unless they follow from the form."""
        if form in ("anyOf", "oneOf", "allOf") and node[form] == []:
            raise _refused(path, form, "is empty")
        if "type" in others and self._kinds(node) <= _wider(node["type"]):
            others = others - {"type"}
        if form == "const" and "enum" in others and isinstance(node["enum"], list):
            same = json.dumps(node["const"], sort_keys=True)
            if any(json.dumps(value, sort_keys=True) == same for value in node["enum"]):
                others = others - {"enum"}
        if others:
            raise _refused(path, min(others), f"has no effect with {form}: use one of the two")
        if form == "oneOf" and isinstance(node[form], list) and self._exclusive(node[form]):
            node["anyOf"] = node.pop("oneOf")

    def _kinds(self, form: Any) -> set[str]:
        """Returns the types of the values that a subschema with a form allows; `*` where they are not known."""
        kinds: set[str] = set()
        seen: set[int] = set()
        pending = [form]
        while pending:
            node = pending.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            first = next((name for name in FORMS if name in node), "") if isinstance(node, dict) else None
            if first == "$ref":
                pending.append(target_of(self._root, node[first]))
            elif first == "const":
                kinds.add(_kind(node[first]))
            elif first == "":
                kind = node.get("type") or _implied(node) or "*"
                kinds.update(map(str, kind if isinstance(kind, list) else [kind]))
            elif first is None or not isinstance(node[first], list):
                kinds.add("*")
            elif first == "enum":
                kinds.update(map(_kind, node[first]))
            else:
                pending.extend(node[first])
        return kinds

    def _exclusive(self, branches: Sequence[Any]) -> bool:
        """Returns whether no value satisfies two branches: a property that each requires has other values in each."""
        resolved = [self._resolved(branch) for branch in branches]
        if not resolved or not all(isinstance(branch, dict) for branch in resolved):
            return False
        return any(_disjoint(_tags(branch, name) for branch in resolved) for name in _required(resolved[0]))

    def _resolved(self, node: Any) -> Any:
        for _ in range(8):
            if not isinstance(node, dict) or "$ref" not in node:
                return node
            node = target_of(self._root, node["$ref"])
        return None


def _check_object(path: str, node: Mapping[str, Any]) -> None:
    properties = node.get("properties")
    named = properties if isinstance(properties, dict) else {}
    for name in _required(node):
        if name not in named:
            raise _refused(
                path, "required", f"names {name[:80]!r}, which {path}/properties does not have: add it there"
            )
    rest = node.get("additionalProperties", node.get("unevaluatedProperties", False))
    if "propertyNames" in node and node.get("additionalProperties") is False:
        raise _refused(path, "additionalProperties", "of false has no effect with propertyNames")
    least = node.get("minProperties", 0)
    if isinstance(least, int) and least > 1 and (rest is not False or "patternProperties" in node):
        raise _refused(path, "minProperties", "above 1 is only supported with additionalProperties of false")
    if isinstance(least, int) and least > 1 and "propertyNames" in node:
        raise _refused(path, "minProperties", "above 1 is not supported with propertyNames")
    patterns = node.get("patternProperties")
    for pattern in patterns if isinstance(patterns, dict) else ():
        check_pattern(pattern, f"{path}/patternProperties")


def _check_string(path: str, node: Mapping[str, Any]) -> None:
    if "pattern" in node and "format" in node:
        raise _refused(path, "pattern", "has no effect with format: use one of the two")
    if "format" in node and node["format"] not in FORMATS:
        raise _refused(path, "format", f"{str(node['format'])[:80]} is not supported")
    if isinstance(node.get("pattern"), str):
        check_pattern(node["pattern"], f"{path}/pattern")


def _check_number(path: str, node: Mapping[str, Any]) -> None:
    """Refuses bounds that leave no number of six decimals, which are as many as xgrammar writes between bounds."""
    below = [_millionths(node, name, ROUND_FLOOR, 1) for name in ("minimum", "exclusiveMinimum")]
    above = [_millionths(node, name, ROUND_CEILING, -1) for name in ("maximum", "exclusiveMaximum")]
    least = max((bound for bound in below if bound is not None), default=None)
    most = min((bound for bound in above if bound is not None), default=None)
    if least is not None and most is not None and least > most:
        name = next(name for name in ("minimum", "exclusiveMinimum") if name in node)
        raise _refused(path, name, "and the bound above it leave no number of six decimals")


def _millionths(node: Mapping[str, Any], name: str, outward: str, inward: int) -> int | None:
    """Returns the bound's nearest number of millionths that the bound allows."""
    value = node.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    exact = Decimal(str(value)) * 1_000_000
    whole = int(exact.to_integral_value(outward))
    return whole if whole == exact and not name.startswith("exclusive") else whole + inward


def _nameless(node: Mapping[str, Any]) -> bool:
    """Returns whether xgrammar takes this subschema for another one that differs in such names, or their values."""
    named = [children for name in _MAPS if isinstance(children := node.get(name), dict)]
    data = [node[name] for name in ("const", "enum") if name in node]
    return any(children.keys() & NAMELESS for children in named) or any(map(_has_nameless, data))


def _has_nameless(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.keys() & NAMELESS) or any(map(_has_nameless, value.values()))
    return isinstance(value, list) and any(map(_has_nameless, value))


def _check_numbers(schema: Any) -> None:
    """Refuses numbers that xgrammar reads as others; walks without recursion."""
    pending = [("#", schema)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            pending.extend((f"{path}/{key[:40]}", child) for key, child in value.items())
        elif isinstance(value, list):
            pending.extend((f"{path}/{index}", child) for index, child in enumerate(value))
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise invalid(SCHEMA, f"has an integer of more than 64 bits at {path}"[:300])
        elif isinstance(value, float) and value in (float("inf"), float("-inf")):
            raise invalid(SCHEMA, f"has a number beyond the largest that JSON's readers hold at {path}"[:300])


def _required(node: Mapping[str, Any]) -> list[str]:
    names = node.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _tags(node: Mapping[str, Any], name: str) -> set[str]:
    """Returns the values of a property that an object must have, as JSON; empty where they are not listed."""
    properties = node.get("properties")
    tag = properties.get(name) if isinstance(properties, dict) else None
    if node.get("type") != "object" or not isinstance(tag, dict) or name not in _required(node):
        return set()
    values = [tag["const"]] if "const" in tag else tag.get("enum")
    # Strings alone: of numbers, 1 and 1.0 are one value.
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return set()
    return set(values)


def _disjoint(sets: Iterable[set[str]]) -> bool:
    """Returns whether no two of the sets share an element, and none is empty."""
    before: set[str] = set()
    for each in sets:
        if not each or each & before:
            return False
        before |= each
    return True


def _implied(node: Mapping[str, Any]) -> str | None:
    return next((kind for kind, names in IMPLIED.items() if any(name in node for name in names)), None)


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object", type(None): "null"}
    return "integer" if isinstance(value, float) and value.is_integer() else kinds.get(type(value), "number")


def _wider(kind: Any) -> set[str]:
    kinds = set(map(str, kind)) if isinstance(kind, list) else {str(kind)}
    return kinds | ({"integer"} if "number" in kinds else set())


def _refused(path: str, name: str, problem: str) -> Exception:
    return invalid(SCHEMA, f"has a constraint that the output cannot be held to: {path[-120:]}/{name} {problem}"[:400])
