"""Every sized field of every request has a bound, and a request beyond one is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from deltamux.errors import InvalidArgumentError
from deltamux.server.transport.limits import LIMITS, Limit, check_limits, is_map, is_sized, key_of
from deltamux.v1 import adapters_pb2, inference_pb2, tenants_pb2

FILES = (inference_pb2, adapters_pb2, tenants_pb2)
PROTOS = Path(__file__).parents[2] / "proto/deltamux/v1"


def fields(message: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    """Yields the fields that a message and the messages in it have; the entries of a map count as the map."""
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        yield field
        if field.message_type is not None and not is_map(field):
            yield from fields(field.message_type, seen)


def sent_by_clients() -> dict[str, FieldDescriptor]:
    seen: set[str] = set()
    services = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]
    inputs = [method.input_type for service in services for method in service.methods]
    return {key_of(field): field for message in inputs for field in fields(message, seen)}


def class_of(message: Any) -> Any:
    return message_factory.GetMessageClass(message)


def text_of(field: FieldDescriptor, size: int) -> Any:
    return b"a" * size if field.type == FieldDescriptor.TYPE_BYTES else "a" * size


def grown(field: FieldDescriptor, limit: Limit, beyond: int) -> Iterator[Any]:
    """Yields messages whose field is as large as each of its bounds allows, or `beyond` more."""
    kind = class_of(field.containing_type)
    if is_map(field):
        yield from (kind(**{field.name: entries}) for entries in maps(field, limit, beyond))
    elif field.is_repeated:
        if limit.count is not None:
            entry = class_of(field.message_type)() if field.message_type else (1 if limit.size is None else "a")
            yield kind(**{field.name: [entry] * (limit.count + beyond)})
        if limit.size is not None:
            yield kind(**{field.name: [text_of(field, limit.size + beyond)]})
    else:
        assert limit.size is not None
        yield kind(**{field.name: text_of(field, limit.size + beyond)})


def maps(field: FieldDescriptor, limit: Limit, beyond: int) -> Iterator[dict[Any, Any]]:
    assert limit.count is not None
    text = limit.key is not None
    yield {(f"{n}" if text else n): ("" if text else 1.0) for n in range(limit.count + beyond)}
    if limit.key is not None and limit.size is not None:
        yield {"k" * (limit.key + beyond): ""}
        yield {"k": "v" * (limit.size + beyond)}


def test_every_sized_field_that_a_client_sends_has_a_bound() -> None:
    sized = {key for key, field in sent_by_clients().items() if is_sized(field)}
    assert sized == set(LIMITS)


@pytest.mark.parametrize("key", sorted(LIMITS))
def test_a_field_is_taken_up_to_its_bound_and_refused_by_name_beyond(key: str) -> None:
    field = sent_by_clients()[key]
    for message in grown(field, LIMITS[key], 0):
        check_limits(message)
    for message in grown(field, LIMITS[key], 1):
        with pytest.raises(InvalidArgumentError, match=f"^{field.name} has .* at most") as refused:
            check_limits(message)
        assert (refused.value.reason, refused.value.metadata["field"]) == ("LIMIT_EXCEEDED", field.name)


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (inference_pb2.Choice(options=["a" * 1000] * 40), "characters in all entries together"),
        (adapters_pb2.UploadHeader(labels={f"{n}": "é" * 100 for n in range(30)}), "bytes in all keys and values"),
    ],
    ids=["choices", "labels"],
)
def test_many_entries_within_their_bounds_are_bounded_together(message: Any, what: str) -> None:
    with pytest.raises(InvalidArgumentError, match=what):
        check_limits(message)


def test_the_field_is_named_by_its_path() -> None:
    message = inference_pb2.GenerateRequest(sampling=inference_pb2.SamplingParameters(stop=["x"] * 100))
    with pytest.raises(InvalidArgumentError, match=r"^sampling\.stop has 100 entries; at most 64 are allowed"):
        check_limits(message)


def test_the_contract_states_the_bounds() -> None:
    """Each bound is a number in the comments of the .proto file that declares its field."""
    files = {file: (PROTOS / Path(file.DESCRIPTOR.name).name).read_text().replace(",", "") for file in FILES}
    texts = {name: text for file, text in files.items() for name in file.DESCRIPTOR.message_types_by_name}
    stated_otherwise = {"GenerateRequest.text", "ChatMessage.content", "FileChunk.data", "FileChunk.path"}
    for key, limit in LIMITS.items():
        for bound in (limit.size, limit.count, limit.key, limit.total):
            if bound is not None and key not in stated_otherwise:
                assert str(bound) in texts[key.split(".")[0]], f"{key}: {bound}"
