"""The Python client: `Client` for threads, `AsyncClient` for asyncio; it requires gRPC only."""

from deltamux.client.aio import AsyncClient
from deltamux.client.results import (
    Adapter,
    AdapterEvent,
    AdapterVersion,
    ApiKey,
    Base,
    Generation,
    SiteSupport,
    Tenant,
    Usage,
)
from deltamux.client.sync import Client
from deltamux.errors import DeltamuxError

__all__ = [
    "Adapter", "AdapterEvent", "AdapterVersion", "ApiKey", "AsyncClient", "Base", "Client", "DeltamuxError",
    "Generation", "SiteSupport", "Tenant", "Usage",
]  # fmt: skip
