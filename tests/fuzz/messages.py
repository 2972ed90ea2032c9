"""Random messages of the contract, as hypothesis strategies made of descriptors; and generations that are right."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from hypothesis import strategies as st

from deltamux.v1 import adapters_pb2, inference_pb2, tenants_pb2

FILES = (inference_pb2, adapters_pb2, tenants_pb2)
METHODS: dict[str, MethodDescriptor] = {
    f"{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every method by the path that gRPC calls it by, without the first slash."""

ADAPTER = "tenants/acme/adapters/tickets"
ESSENTIAL = (
    "name",
    "parent",
    "adapter",
    "token_ids",
    "values",
    "messages",
    "content",
    "header",
    "files",
    "parts",
    "mode",
)
"""Fields without which a message is refused at once."""

NAMES = [
    "",
    "tenants/acme",
    "tenants/acme/adapters/tickets",
    "tenants/acme/adapters/tickets/versions/1",
    "tenants/acme/adapters/tickets/versions/99999999999999999999",
    "tenants/acme/adapters/none",
    "tenants/fuzz-1",
    "tenants/fuzz-1/keys/0",
    "acme",
    "TENANTS/ACME",
    "fuzz-2",
    "MQ==",
    "YQ==",
    "OTk5OTk5OTk5OTk5OTk5OTk5OTk=",
]
PATHS = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "../x", "a/b", "README.md"]
FORMATS = [
    '{"$ref": "#"}',
    '{"$ref": "#/$defs/none"}',
    '{"type": "objec"}',
    '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}',
    '{"enum": []}',
    "[",
    "null",
    '{"items": ' * 40 + "{}" + "}" * 40,
    "(",
    "[ab]{3}",
    "(?=a)b",
    r"(a)\1",
    "a{5000}",
]
TEXTS = [*NAMES, *PATHS, *FORMATS, "hello", "user", "system", "\0", "\ufffd", "é" * 300, "a" * 5000]

text = st.sampled_from(TEXTS) | st.text(max_size=40)
schemas = st.dictionaries(
    st.sampled_from(["type", "$ref", "properties", "anyOf", "items", "enum", "pattern", "minItems", "maxLength"]),
    st.recursive(
        st.sampled_from(["object", "string", "array", "#", "#/properties/a", "[a-c]+", 0, 3, -1, 10**9, None, True]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "type", "$ref"]), inner),
        max_leaves=12,
    ),
    max_size=4,
).map(json.dumps)
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


@st.composite
def message_of(draw: st.DrawFn, kind: Descriptor) -> Any:
    """Draws a message of a kind: what it cannot do without, mostly, and up to three of its other fields."""
    essential = [name for name in ESSENTIAL if name in kind.fields_by_name]
    chosen = (
        draw(st.lists(st.sampled_from(list(kind.fields)), max_size=3, unique_by=lambda f: f.name))
        if kind.fields
        else []
    )
    names = [name for name in essential if draw(st.integers(0, 9)) != 7] + [field.name for field in chosen]
    fields = [kind.fields_by_name[name] for name in dict.fromkeys(names)]
    make = message_factory.GetMessageClass(kind)
    return made(make, {field.name: draw(value_of(field)) for field in fields})


def made(make: Any, given: dict[str, Any]) -> Any:
    """Makes a message; of the fields of a oneof, the last one given is set."""
    message = make()
    for name, value in given.items():
        message.MergeFrom(make(**{name: value}))
    return message


def value_of(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if field.name in ("name", "parent", "adapter", "page_token", "role"):
        right = st.sampled_from(right_for(field))
        return st.one_of(*[right] * 12, text)
    if field.name == "values":
        right_ids = st.lists(st.integers(3, 90), min_size=1, max_size=20)
        return st.one_of(*[right_ids] * 6, st.lists(scalar_of(field), max_size=5))
    if kind is not None and kind.GetOptions().map_entry:
        key, value = kind.fields_by_name["key"], kind.fields_by_name["value"]
        return st.dictionaries(scalar_of(key), scalar_of(value), max_size=5)
    one = scalar_of(field) if kind is None else message_of(kind)
    return st.lists(one, max_size=5) if field.is_repeated else one


def right_for(field: FieldDescriptor) -> list[str]:
    """Returns values of a text field that the server may well take."""
    owner = field.containing_type.name if field.containing_type else ""
    if field.name == "page_token":
        return ["", "MQ==", "YQ==", "YWNtZQ=="]
    if field.name == "role":
        return ["user", "assistant", "system"]
    if "AdapterVersionRequest" in owner:
        return [f"{ADAPTER}/versions/1", f"{ADAPTER}/versions/2"]
    if "Tenant" in owner or "ApiKeysRequest" in owner or owner in ("ListAdaptersRequest", "CreateApiKeyRequest"):
        return ["tenants/acme", "tenants/fuzz-1"]
    if "ApiKey" in owner:
        return ["tenants/acme/keys/0a1b2c3d4e5f"]
    if owner == "GenerateRequest":
        return ["", ADAPTER, f"{ADAPTER}/versions/1"]
    return [ADAPTER, f"{ADAPTER}/versions/1"] if owner == "CompositionPart" else [ADAPTER]


def scalar_of(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.cpp_type in INTEGERS:
        low, high = INTEGERS[field.cpp_type]
        return st.integers(max(low, -2), 20) | st.sampled_from([low, high]) | st.integers(low, high)
    if field.name == "json_schema":
        return schemas | text
    return {
        FieldDescriptor.CPPTYPE_STRING: text if field.type == FieldDescriptor.TYPE_STRING else st.binary(max_size=50),
        FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
        FieldDescriptor.CPPTYPE_DOUBLE: st.floats() | st.floats(-2, 2),
        FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32) | st.floats(-2, 2, width=32),
        FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 5),
    }[field.cpp_type]


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """Draws a method and what is sent to it: a message (several, where it takes a stream), or bytes that are none."""
    name = draw(st.sampled_from(sorted(METHODS)))
    method = METHODS[name]
    many = draw(st.lists(message_of(method.input_type), min_size=1, max_size=4 if method.client_streaming else 1))
    raw = [message.SerializeToString() for message in many]
    if draw(st.integers(0, 9)) == 7:
        raw[-1] = draw(st.binary(max_size=20)) + raw[-1][: draw(st.integers(0, 50))]
    return name, raw
