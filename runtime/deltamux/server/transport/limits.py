"""The bound of every sized field of every request, and the check of a request against it.

Sized fields are text, bytes, repeated fields and maps. `LIMITS` has one entry for each such field of a request;
``tests/server/test_limits.py`` fails for a field without one. The comments of the .proto files state the same bounds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from deltamux.errors import InvalidArgumentError

MIB = 1 << 20
MAX_MESSAGE_BYTES = 8 * MIB
"""Largest message that the server receives or sends."""

SMALL_MESSAGE_BYTES = 1 << 16
"""Largest request without a prompt or a chunk of a file."""

BYTES_PER_TOKEN = 256
"""For a prompt: more than the longest tokens of vocabularies."""

MAX_LABEL_BYTES = 4096
"""All labels of a version together, so that a page of versions fits into one message."""

_TYPE_TEXT = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


@dataclass(frozen=True)
class Limit:
    """The bounds of a field; None for those that do not apply.

    Attributes:
        size: characters of a text, bytes of a bytes field; of each entry of a repeated field, of each value of a map.
        count: entries of a repeated field or map.
        key: characters of each key of a map.
        total: characters of all entries together; of a map, UTF-8 bytes of all keys and values.
    """

    size: int | None = None
    count: int | None = None
    key: int | None = None
    total: int | None = None


NAME = Limit(size=256)
PAGE_TOKEN = Limit(size=512)
LABELS = Limit(size=255, count=32, key=63, total=MAX_LABEL_BYTES)

LIMITS: Mapping[str, Limit] = {
    "GenerateRequest.adapter": NAME,
    # Also bounded by the context: a text that cannot fit is refused before it is tokenised.
    "GenerateRequest.text": Limit(size=MAX_MESSAGE_BYTES),
    # Also bounded by the context, by their number.
    "TokenIds.values": Limit(count=MIB),
    "Chat.messages": Limit(count=1024),
    "ChatMessage.role": Limit(size=64),
    "ChatMessage.content": Limit(size=MAX_MESSAGE_BYTES),
    "SamplingParameters.stop": Limit(size=256, count=64),
    "SamplingParameters.stop_token_ids": Limit(count=256),
    "SamplingParameters.logit_bias": Limit(count=1024),
    "StructuredOutput.json_schema": Limit(size=65_536),
    "StructuredOutput.regex": Limit(size=4096),
    "Choice.options": Limit(size=1024, count=1024, total=32_768),
    "UploadHeader.adapter": NAME,
    "UploadHeader.files": Limit(count=64),
    "UploadHeader.method": Limit(size=128),
    "UploadHeader.labels": LABELS,
    "UploadHeader.expected_digest": Limit(size=128),
    "FileInfo.path": Limit(size=255),
    "FileInfo.sha256": Limit(size=64),
    "FileChunk.path": Limit(size=255),
    "FileChunk.data": Limit(size=MIB),
    "ComposeAdapterRequest.adapter": NAME,
    "ComposeAdapterRequest.parts": Limit(count=64),
    "ComposeAdapterRequest.labels": LABELS,
    "CompositionPart.name": NAME,
    "GetAdapterRequest.name": NAME,
    "ListAdaptersRequest.parent": NAME,
    "ListAdaptersRequest.page_token": PAGE_TOKEN,
    "GetAdapterVersionRequest.name": NAME,
    "ListAdapterVersionsRequest.parent": NAME,
    "ListAdapterVersionsRequest.page_token": PAGE_TOKEN,
    "PromoteAdapterRequest.name": NAME,
    "RollbackAdapterRequest.name": NAME,
    "DeleteAdapterRequest.name": NAME,
    "DeleteAdapterVersionRequest.name": NAME,
    "PinAdapterRequest.name": NAME,
    "UnpinAdapterRequest.name": NAME,
    "WatchAdaptersRequest.parent": NAME,
    "CreateTenantRequest.tenant_id": NAME,
    "GetTenantRequest.name": NAME,
    "ListTenantsRequest.page_token": PAGE_TOKEN,
    "DeleteTenantRequest.name": NAME,
    "CreateApiKeyRequest.parent": NAME,
    "ListApiKeysRequest.parent": NAME,
    "ListApiKeysRequest.page_token": PAGE_TOKEN,
    "DeleteApiKeyRequest.name": NAME,
}


def max_bytes(kind: str, max_model_len: int) -> int:
    """Returns the size limit of a request by its message's name; a larger one is refused before it is decoded."""
    if kind == "GenerateRequest":
        return min(MAX_MESSAGE_BYTES, MIB + BYTES_PER_TOKEN * max_model_len)
    return MIB + SMALL_MESSAGE_BYTES if kind == "UploadAdapterRequest" else SMALL_MESSAGE_BYTES


def check_limits(message: Message) -> None:
    """Raises InvalidArgumentError, reason LIMIT_EXCEEDED, naming the first field that is larger than its bound.

    The number of entries is compared before any entry is checked, which bounds the cost.
    """
    _check(message, "")


def key_of(field: FieldDescriptor) -> str:
    """Returns a field's key in `LIMITS`."""
    owner = field.containing_type
    assert owner is not None, "an extension does not belong to a message"
    return f"{owner.name}.{field.name}"


def is_sized(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated) or field.type in _TYPE_TEXT


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _check(message: Message, path: str) -> None:
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        limit = LIMITS.get(key_of(field)) if is_sized(field) else None
        if limit is not None:
            _check_field(field, value, name, limit)
        if field.message_type is not None and not is_map(field):
            for entry in value if field.is_repeated else (value,):
                _check(entry, f"{name}.")


def _check_field(field: FieldDescriptor, value: Any, name: str, limit: Limit) -> None:
    if not field.is_repeated:
        _check_size(len(value), limit.size, name, "bytes" if field.type == FieldDescriptor.TYPE_BYTES else "characters")
        return
    _check_size(len(value), limit.count, name, "entries")
    if is_map(field):
        _check_map(value, name, limit)
    elif limit.size is not None:
        sizes = [len(entry) for entry in value]
        _check_size(max(sizes), limit.size, name, "characters in one entry")
        _check_size(sum(sizes), limit.total, name, "characters in all entries together")


def _check_map(value: Mapping[Any, Any], name: str, limit: Limit) -> None:
    if limit.key is not None:
        _check_size(_longest(value), limit.key, name, "characters in one key")
    if limit.size is not None:
        _check_size(_longest(value.values()), limit.size, name, "characters in one value")
    if limit.total is not None:
        size = sum(len(key.encode()) + len(text.encode()) for key, text in value.items())
        _check_size(size, limit.total, name, "bytes in all keys and values together")


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


def _check_size(size: int, bound: int | None, name: str, what: str) -> None:
    if bound is not None and size > bound:
        raise InvalidArgumentError(
            f"{name} has {size} {what}; at most {bound} are allowed",
            reason="LIMIT_EXCEEDED",
            metadata={"field": name, "size": str(size), "limit": str(bound)},
        )
