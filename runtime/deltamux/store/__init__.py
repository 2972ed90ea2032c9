"""The adapter store: tenants, adapters and immutable versions; files and SQLite."""

from deltamux.store.objects import PROGRAM_FILE, content_digest
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
from deltamux.store.store import AdapterStore

__all__ = [
    "PROGRAM_FILE", "AdapterKey", "AdapterRecord", "AdapterStore", "ApiKeyRecord", "Canary", "CompiledAdapter",
    "TenantRecord", "VersionKey", "VersionRecord", "VersionState", "content_digest",
]  # fmt: skip
