"""Conversion of the database's rows to records; an invalid value is replaced by a neutral one.

So a damaged row affects no other. `row_checks` reports and repairs it.
"""

import json
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from deltamux.store.objects import ObjectStore, is_digest
from deltamux.store.records import (
    AdapterKey,
    AdapterRecord,
    ApiKeyRecord,
    Canary,
    CompiledAdapter,
    TenantRecord,
    VersionKey,
    VersionRecord,
    VersionState,
)

MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1
LAST_SECOND = 253402300799
"""The last second of the year 9999, in seconds since 1970: the latest valid `datetime`."""


def prepare(connection: sqlite3.Connection) -> None:
    """Makes a connection accept texts that are not valid UTF-8."""
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")


def is_time(value: object) -> bool:
    """Whether a value is a number of seconds since 1970 that `datetime` can represent."""
    return isinstance(value, int | float) and 0 <= value <= LAST_SECOND


def is_number(value: object) -> bool:
    """Whether a value is a version's number."""
    return isinstance(value, int) and 0 < value <= MAX_INT64


def tenant(row: Any) -> TenantRecord:
    return TenantRecord(row["tenant"], _time(row["created"]))


def api_key(row: Any) -> ApiKeyRecord:
    return ApiKeyRecord(row["tenant"], row["key"], _time(row["created"]))


def adapter(row: Any) -> AdapterRecord:
    """Returns an adapter; its serving version is 0 if no row has it."""
    number, percent = row["canary_number"], row["canary_percent"]
    canary = Canary(number, percent) if is_number(number) and percent in range(1, 100) else None
    return AdapterRecord(
        AdapterKey(row["tenant"], row["adapter"]),
        row["serving"] if is_number(row["serving"]) else 0,
        row["previous"] if is_number(row["previous"]) else None,
        canary,
        bool(row["pinned"]),
        _time(row["created"]),
        _time(row["updated"]),
    )


def version(row: Any, objects: ObjectStore) -> VersionRecord:
    """Returns a version."""
    digest = row["digest"] if is_digest(row["digest"]) else ""
    compiled = CompiledAdapter(
        digest,
        _text(row["method"]),
        _whole(row["rank"], MAX_INT32),
        _whole(row["num_virtual_tokens"], MAX_INT32),
        _whole(row["num_bytes"], MAX_INT64),
        _text(row["base_fingerprint"]),
    )
    damage = _damage(row)
    return VersionRecord(
        VersionKey(row["tenant"], row["adapter"], row["number"]),
        compiled,
        _state(row["state"], damage),
        _time(row["created"]),
        objects.program(digest),
        _text(row["sha256"]),
        damage,
        _labels(row["labels"]) or {},
    )


def _damage(row: Any) -> str:
    if not is_digest(row["digest"]):
        return "its row has no valid digest"
    return row["damage"] if isinstance(row["damage"], str) else "its row has no valid damage"


def _state(value: object, damage: str) -> VersionState:
    if value == VersionState.DRAINING:
        return VersionState.DRAINING
    return VersionState.DAMAGED if damage or value != VersionState.READY else VersionState.READY


def _labels(value: object) -> Mapping[str, str] | None:
    try:
        labels = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(labels, dict) or not all(isinstance(text, str) for text in labels.values()):
        return None
    return labels


def _whole(value: object, high: int) -> int:
    return value if isinstance(value, int) and 0 <= value <= high else 0


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _time(value: Any) -> datetime:
    return datetime.fromtimestamp(value if is_time(value) else 0, UTC)
