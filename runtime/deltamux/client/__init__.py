"""The Python client: `Client` for threads, `AsyncClient` for asyncio; it requires gRPC only."""

from deltamux.client.aio import AsyncClient
from deltamux.client.results import Adapter, AdapterEvent, AdapterVersion, ApiKey, Generation, Tenant, Usage
from deltamux.client.sync import Client
from deltamux.errors import DeltamuxError

__all__ = [
    "Adapter", "AdapterEvent", "AdapterVersion", "ApiKey", "AsyncClient", "Client", "DeltamuxError", "Generation",
    "Tenant", "Usage",
]  # fmt: skip
