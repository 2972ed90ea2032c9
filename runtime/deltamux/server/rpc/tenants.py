"""The Tenants service: tenants and their API keys; for the administrator, and for a tenant what is its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from google.protobuf.empty_pb2 import Empty

from deltamux.server.access.caller import current_caller
from deltamux.server.events import EventHub
from deltamux.server.rpc.messages import (
    adapter_message,
    after_token,
    api_key_message,
    page_size,
    page_token,
    tenant_message,
)
from deltamux.server.rpc.names import check_id, parse_key, parse_tenant
from deltamux.server.transport.finishing import finished
from deltamux.server.transport.interceptors import Context
from deltamux.store import AdapterStore
from deltamux.v1 import adapters_pb2
from deltamux.v1 import tenants_pb2 as pb
from deltamux.v1 import tenants_pb2_grpc as pb_grpc

T = TypeVar("T")


class TenantsService(pb_grpc.TenantsServicer):
    """See tenants.proto for the contract. What touches the disk runs in `threads`."""

    def __init__(self, store: AdapterStore, events: EventHub, threads: Executor) -> None:
        self._store = store
        self._events = events
        self._threads = threads

    async def CreateTenant(self, request: pb.CreateTenantRequest, context: Context) -> pb.Tenant:
        current_caller().check_administrator()
        tenant = check_id(request.tenant_id, "tenant_id")
        return tenant_message(await self._run(lambda: self._store.tenants.create(tenant)))

    async def GetTenant(self, request: pb.GetTenantRequest, context: Context) -> pb.Tenant:
        tenant = self._own(request.name)
        return tenant_message(await self._run(lambda: self._store.tenants.get(tenant)))

    async def ListTenants(self, request: pb.ListTenantsRequest, context: Context) -> pb.ListTenantsResponse:
        current_caller().check_administrator()
        size, after = page_size(request.page_size), after_token(request.page_token)
        found = await self._run(lambda: self._store.tenants.page(after=after, limit=size + 1))
        token = page_token(found[size - 1].tenant) if len(found) > size else ""
        return pb.ListTenantsResponse(tenants=map(tenant_message, found[:size]), next_page_token=token)

    async def DeleteTenant(self, request: pb.DeleteTenantRequest, context: Context) -> Empty:
        current_caller().check_administrator()
        tenant = parse_tenant(request.name)
        await finished(self._delete(tenant, request.force))
        return Empty()

    async def _delete(self, tenant: str, force: bool) -> None:
        async with self._events.order:
            for adapter in await self._run(lambda: self._store.delete_tenant(tenant, force=force)):
                deleted = adapters_pb2.AdapterEvent.DELETED
                event = adapters_pb2.AdapterEvent(type=deleted, adapter=adapter_message(adapter))
                self._events.publish(adapter.key, event)

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Context) -> pb.ApiKey:
        current_caller().check_administrator()
        tenant = parse_tenant(request.parent, "parent")
        record, secret = await self._run(lambda: self._store.tenants.create_key(tenant))
        return api_key_message(record, secret)

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Context) -> pb.ListApiKeysResponse:
        size, tenant = page_size(request.page_size), self._own(request.parent, "parent")
        after = after_token(request.page_token)
        found = await self._run(lambda: self._store.tenants.keys(tenant, after=after, limit=size + 1))
        token = page_token(found[size - 1].key) if len(found) > size else ""
        return pb.ListApiKeysResponse(api_keys=map(api_key_message, found[:size]), next_page_token=token)

    async def DeleteApiKey(self, request: pb.DeleteApiKeyRequest, context: Context) -> Empty:
        current_caller().check_administrator()
        key = parse_key(request.name)
        await self._run(lambda: self._store.tenants.delete_key(*key))
        return Empty()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _own(self, name: str, field: str = "name") -> str:
        tenant = parse_tenant(name, field)
        current_caller().check_may_see(tenant, name)
        return tenant
