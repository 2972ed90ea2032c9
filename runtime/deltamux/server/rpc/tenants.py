"""The Tenants service: tenants and their API keys; a tenant may read its own."""

from google.protobuf.empty_pb2 import Empty

from deltamux.server.access.caller import current_caller
from deltamux.server.disk import DiskThreads
from deltamux.server.rpc.events import EventHub
from deltamux.server.rpc.messages import adapter_message, api_key_message, tenant_message
from deltamux.server.rpc.names import check_id, parse_key, parse_tenant
from deltamux.server.rpc.paging import after_id, page_size, split_page
from deltamux.server.transport.completion import run_to_completion
from deltamux.server.transport.interceptors import Context
from deltamux.store import AdapterStore
from deltamux.v1 import adapters_pb2
from deltamux.v1 import tenants_pb2 as pb
from deltamux.v1 import tenants_pb2_grpc as pb_grpc


class TenantsService(pb_grpc.TenantsServicer):
    """The service of tenants.proto. Disk access is in `threads`."""

    def __init__(self, store: AdapterStore, events: EventHub, threads: DiskThreads) -> None:
        self._store = store
        self._events = events
        self._threads = threads

    async def CreateTenant(self, request: pb.CreateTenantRequest, context: Context) -> pb.Tenant:
        current_caller().check_administrator()
        tenant = check_id(request.tenant_id, "tenant_id")
        return tenant_message(await self._threads.run(self._store.tenants.create, tenant))

    async def GetTenant(self, request: pb.GetTenantRequest, context: Context) -> pb.Tenant:
        tenant = self._own(request.name)
        return tenant_message(await self._threads.run(self._store.tenants.get, tenant))

    async def ListTenants(self, request: pb.ListTenantsRequest, context: Context) -> pb.ListTenantsResponse:
        current_caller().check_administrator()
        size, after = page_size(request.page_size), after_id(request.page_token)
        found = await self._threads.run(self._store.tenants.page, after=after, limit=size + 1)
        page, token = split_page(found, size, lambda record: record.tenant)
        return pb.ListTenantsResponse(tenants=map(tenant_message, page), next_page_token=token)

    async def DeleteTenant(self, request: pb.DeleteTenantRequest, context: Context) -> Empty:
        current_caller().check_administrator()
        tenant = parse_tenant(request.name)
        await run_to_completion(self._delete(tenant, request.force))
        return Empty()

    async def _delete(self, tenant: str, force: bool) -> None:
        async with self._events.lock:
            for adapter in await self._threads.run(self._store.delete_tenant, tenant, force=force):
                deleted = adapters_pb2.AdapterEvent.DELETED
                event = adapters_pb2.AdapterEvent(type=deleted, adapter=adapter_message(adapter))
                self._events.publish(adapter.key, event)
            self._events.revoke(tenant)

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Context) -> pb.ApiKey:
        current_caller().check_administrator()
        tenant = parse_tenant(request.parent, "parent")
        record, secret = await self._threads.run(self._store.tenants.create_key, tenant)
        return api_key_message(record, secret)

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Context) -> pb.ListApiKeysResponse:
        size, tenant = page_size(request.page_size), self._own(request.parent, "parent")
        after = after_id(request.page_token)
        found = await self._threads.run(self._store.tenants.keys, tenant, after=after, limit=size + 1)
        page, token = split_page(found, size, lambda record: record.key)
        return pb.ListApiKeysResponse(api_keys=map(api_key_message, page), next_page_token=token)

    async def DeleteApiKey(self, request: pb.DeleteApiKeyRequest, context: Context) -> Empty:
        current_caller().check_administrator()
        key = parse_key(request.name)
        await run_to_completion(self._delete_key(*key))
        return Empty()

    async def _delete_key(self, tenant: str, key: str) -> None:
        await self._threads.run(self._store.tenants.delete_key, tenant, key)
        self._events.revoke(tenant, key)

    def _own(self, name: str, field: str = "name") -> str:
        tenant = parse_tenant(name, field)
        current_caller().check_may_see(tenant, name)
        return tenant
