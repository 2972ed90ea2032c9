"""Translation of errors to `google.rpc.Status`."""

import os
import re
from functools import cache
from itertools import islice

import grpc
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # its .pyi files come without py.typed

from deltamux.errors import DeltamuxError

DOMAIN = "deltamux"
MAX_MESSAGE_BYTES = 1200
MAX_VALUE_BYTES = 200
MAX_METADATA = 8
"""A status is sent in the trailers, which clients bound to 8 KiB."""

_PATHS = re.compile(r"""'/[^'\n]*'|"/[^"\n]*"|(?<![\w.#-])/+[^\s'"`<>:,;()\[\]{}|]+""")


def status_of(error: DeltamuxError) -> status_pb2.Status:
    """Returns an error's status with ErrorInfo, and BadRequest or RetryInfo if it has a field or a retry time."""
    shown = {k: without_paths(v) for k, v in islice(error.metadata.items(), MAX_METADATA)}
    metadata = {_clip(k, MAX_VALUE_BYTES): _clip(v, MAX_VALUE_BYTES) for k, v in shown.items()}
    text = _clip(without_paths(error.message), MAX_MESSAGE_BYTES)
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


def without_paths(text: str) -> str:
    """Returns a text without the directories of this machine's paths, which are for the server's log only.

    A path begins with an existing directory of the root; one with spaces is recognised if it is quoted.
    """
    return _PATHS.sub(_shortened, text)


def _shortened(found: re.Match[str]) -> str:
    whole = found[0]
    quote = whole[0] if whole[0] in "'\"" else ""
    path = whole.strip("'\"").rstrip("/.")
    first, _, rest = path.lstrip("/").partition("/")
    if not rest or first not in _roots():
        return whole
    return f"{quote}…/{path.rpartition('/')[2]}{quote}"


@cache
def _roots() -> frozenset[str]:
    return frozenset(os.listdir("/"))


def _packed(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _clip(text: str, max_bytes: int) -> str:
    """Returns valid UTF-8 of at most `max_bytes` bytes; names in an uploaded file may not be valid."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= max_bytes:
        return raw.decode()
    return raw[: max_bytes - 3].decode("utf-8", "ignore") + "…"
