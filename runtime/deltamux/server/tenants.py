"""The Tenants service: tenants and their API keys; for the administrator, and for a tenant what is its own."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.empty_pb2 import Empty

from deltamux.server.caller import current_caller
from deltamux.server.interceptors import Context
from deltamux.server.messages import after_token, api_key_message, page_size, page_token, tenant_message
from deltamux.server.names import check_id, parse_key, parse_tenant
from deltamux.store import AdapterRecord, AdapterStore
from deltamux.v1 import tenants_pb2 as pb
from deltamux.v1 import tenants_pb2_grpc as pb_grpc


class TenantsService(pb_grpc.TenantsServicer):
    """See tenants.proto for the contract. Its calls are rare and short, so they run on the event loop."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    async def CreateTenant(self, request: pb.CreateTenantRequest, context: Context) -> pb.Tenant:
        current_caller().check_administrator()
        return tenant_message(self._store.tenants.create(check_id(request.tenant_id, "tenant_id")))

    async def GetTenant(self, request: pb.GetTenantRequest, context: Context) -> pb.Tenant:
        return tenant_message(self._store.tenants.get(self._own(request.name)))

    async def ListTenants(self, request: pb.ListTenantsRequest, context: Context) -> pb.ListTenantsResponse:
        current_caller().check_administrator()
        size = page_size(request.page_size)
        found = self._store.tenants.page(after=after_token(request.page_token), limit=size + 1)
        token = page_token(found[size - 1].tenant) if len(found) > size else ""
        return pb.ListTenantsResponse(tenants=map(tenant_message, found[:size]), next_page_token=token)

    async def DeleteTenant(self, request: pb.DeleteTenantRequest, context: Context) -> Empty:
        current_caller().check_administrator()
        tenant = parse_tenant(request.name)
        self._store.tenants.get(tenant)
        for adapter in self._adapters(tenant) if request.force else ():
            self._store.delete_adapter(adapter.key)
        self._store.tenants.delete(tenant)
        return Empty()

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Context) -> pb.ApiKey:
        current_caller().check_administrator()
        record, secret = self._store.tenants.create_key(parse_tenant(request.parent, "parent"))
        return api_key_message(record, secret)

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Context) -> pb.ListApiKeysResponse:
        size, tenant = page_size(request.page_size), self._own(request.parent, "parent")
        found = self._store.tenants.keys(tenant, after=after_token(request.page_token), limit=size + 1)
        token = page_token(found[size - 1].key) if len(found) > size else ""
        return pb.ListApiKeysResponse(api_keys=map(api_key_message, found[:size]), next_page_token=token)

    async def DeleteApiKey(self, request: pb.DeleteApiKeyRequest, context: Context) -> Empty:
        current_caller().check_administrator()
        self._store.tenants.delete_key(*parse_key(request.name))
        return Empty()

    def _adapters(self, tenant: str) -> Iterator[AdapterRecord]:
        while page := self._store.adapters(tenant):
            yield from page

    def _own(self, name: str, field: str = "name") -> str:
        tenant = parse_tenant(name, field)
        current_caller().check_may_see(tenant, name)
        return tenant
