"""From an error of deltamux to the `google.rpc.Status` that the caller receives."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2, message
from google.rpc import (  # type: ignore[import-untyped]  # its .pyi files come without py.typed
    error_details_pb2,
    status_pb2,
)

from deltamux.errors import DeltamuxError

DOMAIN = "deltamux"
MAX_MESSAGE_BYTES = 1200
MAX_VALUE_BYTES = 200
MAX_METADATA = 8
"""A status travels in the trailers, which every client bounds to 8 KiB: a longer one would reach nobody."""


def status_of(error: DeltamuxError) -> status_pb2.Status:
    """Returns the error as its status with ErrorInfo, and BadRequest or RetryInfo where it knows field or time."""
    metadata = {_clip(k, MAX_VALUE_BYTES): _clip(v, MAX_VALUE_BYTES) for k, v in _first(error.metadata).items()}
    text = _clip(error.message, MAX_MESSAGE_BYTES)
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    ]
    if error.status == "INVALID_ARGUMENT" and "field" in metadata:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=metadata["field"], description=_clip(text, MAX_VALUE_BYTES)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after * 1000))
        details.append(retry)
    code: int = grpc.StatusCode[error.status].value[0]
    return status_pb2.Status(code=code, message=text, details=[_packed(detail) for detail in details])


def _packed(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _first(metadata: Mapping[str, str]) -> dict[str, str]:
    return dict(list(metadata.items())[:MAX_METADATA])


def _clip(text: str, max_bytes: int) -> str:
    """Returns valid UTF-8 of at most so many bytes: names in an uploaded file may hold anything."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= max_bytes:
        return raw.decode()
    return raw[: max_bytes - 3].decode("utf-8", "ignore") + "…"
