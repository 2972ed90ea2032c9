"""A JSON schema is held to in all that it says, or refused by the name of what it could not be held to."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # without stubs
import numpy as np
import pytest
import xgrammar

from deltamux.engine.base import StructuredOutput
from deltamux.engine.vllm.grammars.admission import constraint_of
from deltamux.errors import InvalidArgumentError
from deltamux_testing.tiny_base import byte_tokenizer

INTEGER, TEXT = {"type": "integer"}, {"type": "string"}
TITLED = [{"type": "object", "properties": {"title": kind}, "required": ["title"]} for kind in (TEXT, INTEGER)]
TAGGED = [
    {"type": "object", "properties": {"kind": {"const": kind}, "of": INTEGER}, "required": ["kind"]} for kind in "ab"
]


def tuple_of(*items: Any) -> dict[str, Any]:
    return {"type": "array", "prefixItems": list(items), "items": False, "minItems": len(items)}


def object_of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        # Constraints in a subschema that has a form.
        ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": INTEGER}}, "#/minimum has no effect with $ref"),
        ({"enum": ["a", "bb"], "minLength": 2}, "#/minLength has no effect with enum"),
        ({"type": "integer", "enum": [1, "a"]}, "#/type has no effect with enum"),
        ({"type": "integer", "const": "a"}, "#/type has no effect with const"),
        ({"const": "b", "enum": ["a"]}, "#/enum has no effect with const"),
        ({"type": "object", "anyOf": [{"required": ["a"]}]}, "#/type has no effect with anyOf"),
        ({"anyOf": [INTEGER], "oneOf": [TEXT]}, "#/oneOf has no effect with anyOf"),
        (object_of(a={"minimum": 5, "allOf": [INTEGER]}), "#/properties/a/minimum has no effect with allOf"),
        ({"anyOf": []}, "anyOf is empty"),
        ({"allOf": []}, "allOf is empty"),
        # What has no type.
        ({"minimum": 5}, "#/minimum has no effect without a type"),
        ({"required": ["a"]}, "#/required has no effect without a type"),
        ({"type": "array", "items": {"pattern": "^a$"}}, "#/items/pattern has no effect without a type"),
        ({"patternProperties": {"a": INTEGER}}, "#/patternProperties has no effect without a type"),
        ({"type": []}, "type is empty"),
        # What is never held to.
        ({"type": "integer", "not": {"const": 5}}, "#/not is not supported"),
        ({"type": "integer", "if": {"minimum": 5}, "then": {"maximum": 6}}, "#/if is not supported"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "#/dependentRequired is not supported"),
        ({"type": "object", "dependentSchemas": {"a": {}}}, "#/dependentSchemas is not supported"),
        ({"items": INTEGER, "uniqueItems": True}, "#/uniqueItems is not supported"),
        ({"contains": INTEGER}, "#/contains is not supported"),
        ({"multipleOf": 3}, "#/multipleOf is not supported"),
        ({"$dynamicRef": "#x"}, "#/$dynamicRef is not supported"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"not": {}}}}, "#/$defs/a/not is not supported"),
        # Objects.
        ({"type": "object", "properties": {"a": INTEGER}, "required": ["b"]}, "#/required names 'b'"),
        ({"type": "object", "additionalProperties": INTEGER, "minProperties": 2}, "#/minProperties above 1"),
        ({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "minProperties": 2}, "#/minProperties above 1"),
        ({"type": "object", "propertyNames": {}, "additionalProperties": False}, "#/additionalProperties of false"),
        ({"type": "object", "propertyNames": {"enum": [1]}}, "#/propertyNames/enum allows names that are not strings"),
        ({"type": "object", "propertyNames": {"$ref": "#"}}, "allows names that are not strings"),
        # Strings and numbers.
        ({"type": "string", "format": "date", "pattern": "^2"}, "#/pattern has no effect with format"),
        ({"type": "string", "format": "json-pointer"}, "json-pointer is not supported"),
        ({"type": "string", "format": "phone"}, "#/format phone is not supported"),
        ({"type": ["string", "null"], "format": {}}, "#/format {} is not supported"),
        ({"const": {"type": "string", "format": []}}, "cannot hold to"),
        ({"type": "string", "pattern": r"\ud800"}, "half of a surrogate pair"),
        ({"type": "string", "pattern": r"^a\\$"}, "#/pattern matches a quotation mark, a backslash"),
        ({"type": "string", "pattern": '"'}, "#/pattern matches a quotation mark"),
        ({"type": "string", "pattern": "a\\n"}, "or a control character"),
        ({"type": "string", "pattern": r"[\x00-\x1f]"}, "or a control character"),
        ({"type": "string", "pattern": r"\u005c"}, "a backslash"),
        ({"type": "object", "patternProperties": {"\t": {}}}, "#/patternProperties matches"),
        ({"type": "number", "minimum": 0.1234567, "maximum": 0.1234568}, "#/minimum and the bound above it leave no"),
        ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.000001}, "leave no number"),
        ({"const": 1 << 64}, "more than 64 bits at #/const"),
        ('{"const": 1e400}', "at #/const"),
        ({"const": "\ud800"}, "surrogate"),
        # JSON that its readers read as they like.
        ('{"type": "integer", "type": "string"}', "the key 'type' twice"),
        ('{"const": NaN}', "NaN is not a value of JSON"),
        # Members that never end.
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1}, "never ends"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}, "b": TEXT}, "minProperties": 2}, "never ends"),
    ],
)
def test_what_the_output_could_not_be_held_to_is_refused_by_its_name(schema: Any, named: str) -> None:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(InvalidArgumentError) as refused:
        constraint_of(StructuredOutput(json_schema=text))
    assert named in refused.value.message
    assert refused.value.metadata == {"field": "sampling.structured_output.json_schema"}


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    info = xgrammar.TokenizerInfo.from_huggingface(byte_tokenizer())
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


@pytest.mark.parametrize(
    "schema",
    [
        # Subschemas that differ in names that are keywords elsewhere.
        tuple_of(*TITLED),
        tuple_of(*({"const": {"title": n}} for n in (1, 2))),
        tuple_of(*({"type": "array", "items": {"enum": [{"default": n}]}, "minItems": 1} for n in (1, 2))),
        tuple_of(*(object_of(a=each) for each in TITLED)),
        tuple_of(
            *(
                {"type": "object", "patternProperties": {"title": kind}, "minProperties": 1}
                for kind in (INTEGER, {"type": "null"})
            )
        ),
        # Forms that say the same twice.
        {"type": "string", "const": "a", "enum": ["a"], "title": "Kind"},
        {"type": ["string", "null"], "enum": ["a", None], "description": "a or nothing"},
        {"type": "number", "enum": [1, 2.5]},
        {"type": "object", "anyOf": TAGGED},
        {"oneOf": TAGGED},
        {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": TAGGED[0], "b": TAGGED[1]}},
        {"oneOf": [INTEGER, {"type": "boolean"}]},
        # Implied types.
        {"properties": {"a": INTEGER}, "required": ["a"]},
        {"items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        # References, bounded and not.
        {"$ref": "#/$defs/n", "$defs": {"n": object_of(next={"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]})}},
        {"type": "array", "items": {"$ref": "#"}},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"const": 1}]}, "b": INTEGER}, "$ref": "#/$defs/a"},
        # Bounds of numbers, and odd values.
        {"type": "number", "minimum": -12.75, "maximum": 0.03},
        {"type": "number", "exclusiveMinimum": 0.1, "maximum": 0.1001},
        {"type": "integer", "minimum": 99, "exclusiveMaximum": 1001},
        {"type": ["integer", "null"], "maximum": -17},
        {"enum": [1.0, -0.0, 1e22, 9223372036854775807, "\u2028é", "\u0000", {"a": [None, True]}, ""]},
        object_of(**{'a"b': INTEGER, "\\": INTEGER, "é\n": INTEGER, "": INTEGER}),
        {"type": "object", "properties": {"a": INTEGER, "b": INTEGER, "c": INTEGER}, "minProperties": 2},
        {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": {"type": "boolean"}},
        {"type": "object", "propertyNames": {"pattern": "^[a-c]+$"}, "additionalProperties": INTEGER},
        # Lengths, of which the shortest texts are the likeliest to hold a control character alone.
        *({"type": "string", "minLength": low, "maxLength": high} for low, high in ((0, 1), (1, 1), (2, 4), (0, 0))),
        {"type": ["string", "null"], "maxLength": 2},
        {"type": "string", "minLength": 2},
        {"type": "object", "propertyNames": {"maxLength": 2}, "additionalProperties": INTEGER},
        {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 3},
        # Patterns whose classes hold what JSON escapes.
        {"type": "string", "pattern": r"^[^\\/]{2}$"},
        {"type": "string", "pattern": "^[ -~]{3}$"},
        {"type": "string", "pattern": r"^\s[\w\\]$"},
    ],
)
def test_every_text_of_an_accepted_schema_satisfies_it(schema: dict[str, Any], compiler: Any) -> None:
    constraint = constraint_of(StructuredOutput(json_schema=json.dumps(schema)))
    compiled = compiler.compile_json_schema(constraint.text)
    # What is not UTF-8 is the drawing's doing, which knows nothing of characters; a tokenizer replaces it.
    texts = [text for text in texts_of(compiled, 40) if "\ufffd" not in text]
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


def texts_of(compiled: Any, count: int) -> Iterator[str]:
    """Yields what a model that draws among the allowed tokens writes, where it comes to an end within 300 tokens."""
    vocabulary = compiled.tokenizer_info
    stops, decoded = set(vocabulary.stop_token_ids), vocabulary.decoded_vocab
    bitmask = xgrammar.allocate_token_bitmask(1, vocabulary.vocab_size)
    for seed in range(count):
        choose, matcher, written = random.Random(seed), xgrammar.GrammarMatcher(compiled), b""
        for _ in range(300):
            matcher.fill_next_token_bitmask(bitmask)
            bits = np.unpackbits(bitmask[0].numpy().view(np.uint8), bitorder="little")[: vocabulary.vocab_size]
            allowed = np.flatnonzero(bits).tolist()
            if stops.intersection(allowed) and (choose.random() < 0.5 or stops.issuperset(allowed)):
                yield written.decode("utf-8", "replace")
                break
            tokens = [token for token in allowed if token not in stops]
            closing = [token for token in tokens if decoded[token] in (b'"', b"}", b"]", b"0", b"n")]
            token = choose.choice(closing if closing and choose.random() < 0.6 else tokens)
            assert matcher.accept_token(token)
            written += decoded[token]


def test_lengths_beyond_what_patterns_can_be_made_of_stay_as_they_are() -> None:
    lengths = [900, 900, 900]
    schema = object_of(**{f"p{number}": {"type": "string", "maxLength": most} for number, most in enumerate(lengths)})
    read = json.loads(constraint_of(StructuredOutput(json_schema=json.dumps(schema))).text)
    assert sorted(sorted(each.keys() - {"type"}) for each in read["properties"].values()) == [
        ["maxLength"],
        ["pattern"],
        ["pattern"],
    ]
