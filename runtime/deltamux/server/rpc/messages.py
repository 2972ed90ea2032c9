"""The store's records as messages of the contract, and page tokens."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from datetime import datetime
from typing import TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from deltamux.errors import InvalidArgumentError
from deltamux.server.rpc.names import is_id
from deltamux.store import AdapterRecord, ApiKeyRecord, TenantRecord, VersionRecord, VersionState
from deltamux.v1 import adapters_pb2, tenants_pb2

DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_PAGE_BYTES = 4 << 20
"""Of one page's entries, which a response holds beside little else."""

M = TypeVar("M", bound=Message)
_NUMBER = re.compile("[1-9][0-9]{0,17}")
_STATES = {
    VersionState.READY: adapters_pb2.ADAPTER_VERSION_STATE_READY,
    VersionState.DRAINING: adapters_pb2.ADAPTER_VERSION_STATE_DRAINING,
    VersionState.DAMAGED: adapters_pb2.ADAPTER_VERSION_STATE_DAMAGED,
}


def adapter_message(record: AdapterRecord, problem: str = "") -> adapters_pb2.Adapter:
    split = record.canary
    canary = None if split is None else adapters_pb2.Canary(version=split.number, percent=split.percent)
    return adapters_pb2.Adapter(
        name=str(record.key),
        serving_version=record.serving,
        previous_version=record.previous or 0,
        canary=canary,
        pinned=record.pinned,
        create_time=_timestamp(record.created),
        update_time=_timestamp(record.updated),
        problem=problem,
    )


def version_message(record: VersionRecord) -> adapters_pb2.AdapterVersion:
    compiled = record.compiled
    return adapters_pb2.AdapterVersion(
        name=str(record.key),
        version=record.key.number,
        digest=compiled.digest,
        method=compiled.method,
        state=_STATES[record.state],
        rank=compiled.rank,
        num_virtual_tokens=compiled.num_virtual_tokens,
        size_bytes=compiled.num_bytes,
        labels=record.labels,
        create_time=_timestamp(record.created),
    )


def tenant_message(record: TenantRecord) -> tenants_pb2.Tenant:
    return tenants_pb2.Tenant(name=f"tenants/{record.tenant}", create_time=_timestamp(record.created))


def api_key_message(record: ApiKeyRecord, secret: str = "") -> tenants_pb2.ApiKey:
    name = f"tenants/{record.tenant}/keys/{record.key}"
    return tenants_pb2.ApiKey(name=name, create_time=_timestamp(record.created), secret=secret)


def page_size(requested: int) -> int:
    """Returns how many records a page holds: the size asked for, within bounds; 0 asks for the default."""
    if requested < 0:
        raise InvalidArgumentError(f"page_size {requested} is negative", metadata={"field": "page_size"})
    return min(requested or DEFAULT_PAGE, MAX_PAGE)


def page_token(last: str) -> str:
    """Returns the token of the page that begins behind `last`."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def after_token(token: str) -> str:
    """Returns the id that the page of a token begins behind; "" for the first page.

    Raises:
        InvalidArgumentError: the token is not one that `page_token` has made of an id.
    """
    after = _decoded(token)
    if token and (after is None or not is_id(after)):
        raise _invalid_token(token)
    return after or ""


def after_number(token: str) -> int:
    """Returns the version's number that the page of a token begins behind; 0 for the first page. Raises likewise."""
    after = _decoded(token)
    if token and (after is None or not _NUMBER.fullmatch(after)):
        raise _invalid_token(token)
    return int(after or 0)


def within_page(messages: Iterable[M]) -> list[M]:
    """Returns the messages that fit into one response: as many from the first as `MAX_PAGE_BYTES` hold, at least one.

    What was stored before its parts had bounds may be larger than a page's share.
    """
    page: list[M] = []
    size = 0
    for message in messages:
        size += message.ByteSize()
        if page and size > MAX_PAGE_BYTES:
            break
        page.append(message)
    return page


def _decoded(token: str) -> str | None:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError:
        return None


def _invalid_token(token: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{token[:80]!r} is not a page token: send the one of the last answer, or none",
        reason="INVALID_PAGE_TOKEN",
        metadata={"field": "page_token"},
    )


def _timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp
