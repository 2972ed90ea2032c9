"""The Adapters service: upload, get, list, promote, roll back, delete, pin, watch."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.empty_pb2 import Empty

from deltamux.errors import DeltamuxError, InvalidArgumentError, NotFoundError
from deltamux.server.access.caller import current_caller
from deltamux.server.access.concurrency import ConcurrencyLimit
from deltamux.server.compiling.quarantine import Quarantine, Upload
from deltamux.server.disk import DiskThreads
from deltamux.server.pins import Pins
from deltamux.server.programs import Programs
from deltamux.server.rpc.composing import NamedPart, mode_of, stage_composition
from deltamux.server.rpc.events import EventHub
from deltamux.server.rpc.messages import adapter_message, version_message
from deltamux.server.rpc.names import parse_adapter, parse_adapter_or_version, parse_tenant, parse_version
from deltamux.server.rpc.paging import after_id, after_number, page_size, page_token, split_page, within_page
from deltamux.server.rpc.uploads import UploadLimits, read_header, receive_files
from deltamux.server.transport.completion import run_to_completion
from deltamux.server.transport.interceptors import Context
from deltamux.store import AdapterKey, AdapterRecord, AdapterStore, VersionKey, VersionRecord
from deltamux.v1 import adapters_pb2 as pb
from deltamux.v1 import adapters_pb2_grpc as pb_grpc

log = logging.getLogger("deltamux.server")


@dataclass(frozen=True, eq=False)
class AdaptersService(pb_grpc.AdaptersServicer):
    """The service of adapters.proto. Disk access is in `threads`."""

    _store: AdapterStore
    _programs: Programs
    _pins: Pins
    _quarantine: Quarantine
    _events: EventHub
    _uploads: ConcurrencyLimit
    _limits: UploadLimits
    _threads: DiskThreads

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.AdapterVersion:
        messages = aiter(request_iterator)
        header = await read_header(messages, self._limits)
        key = self._own(parse_adapter(header.adapter, "header.adapter"))
        upload = Upload(
            key,
            method=header.method,
            expected_digest=header.expected_digest,
            promote=header.promote if header.HasField("promote") else None,
            labels=dict(header.labels),
        )
        # Staged before the wait for a permit: a deletion of its tenant in between ends the upload.
        with self._store.staging() as staged:
            async with self._uploads.acquire(key.tenant) as permit:
                await receive_files(header, messages, staged, self._limits, self._threads, permit)
                version = await self._admit(staged, upload)
        await self._load(version)
        return version_message(version)

    async def ComposeAdapter(self, request: pb.ComposeAdapterRequest, context: Context) -> pb.AdapterVersion:
        key = self._own(parse_adapter(request.adapter, "adapter"))
        parts = [self._part(part) for part in request.parts]
        mode = mode_of(request.mode)
        promote = request.promote if request.HasField("promote") else None
        with self._store.staging() as staged:
            async with self._uploads.acquire(key.tenant):
                await self._threads.run(stage_composition, self._store, parts, mode, staged)
                upload = Upload(key, promote=promote, labels=dict(request.labels))
                version = await self._admit(staged, upload)
        await self._load(version)
        return version_message(version)

    async def _admit(self, staged: Path, upload: Upload) -> VersionRecord:
        compiled = await self._quarantine.check(staged, upload)

        async def commit() -> VersionRecord:
            version = await self._quarantine.commit(staged, upload, compiled)
            await self._publish(pb.AdapterEvent.VERSION_CREATED, upload.key, version.key.number)
            return version

        return await run_to_completion(commit())

    def _part(self, part: pb.CompositionPart) -> NamedPart:
        key = parse_adapter_or_version(part.name, "parts.name")
        current_caller().check_may_see(key.tenant, part.name)
        return NamedPart(part.name, key, part.weight if part.HasField("weight") else 1.0)

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.Adapter:
        key = self._own(parse_adapter(request.name))
        return self._message(await self._threads.run(self._store.adapter, key))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        tenant = self._own_tenant(request.parent)
        after, size = after_id(request.page_token), page_size(request.page_size)
        found = await self._threads.run(self._store.adapters, tenant, after=after, limit=size + 1)
        page, token = split_page(found, size, lambda record: record.key.adapter)
        return pb.ListAdaptersResponse(adapters=map(self._message, page), next_page_token=token)

    async def GetAdapterVersion(self, request: pb.GetAdapterVersionRequest, context: Context) -> pb.AdapterVersion:
        key = self._own_version(request.name)
        return version_message(await self._threads.run(self._store.version, key))

    async def ListAdapterVersions(
        self, request: pb.ListAdapterVersionsRequest, context: Context
    ) -> pb.ListAdapterVersionsResponse:
        key = self._own(parse_adapter(request.parent, "parent"))
        after, size = after_number(request.page_token), page_size(request.page_size)
        found = await self._threads.run(self._store.versions, key, after=after, limit=size + 1)
        page = within_page(map(version_message, found[:size]))
        token = page_token(str(page[-1].version)) if len(found) > len(page) else ""
        return pb.ListAdapterVersionsResponse(versions=page, next_page_token=token)

    async def PromoteAdapter(self, request: pb.PromoteAdapterRequest, context: Context) -> pb.Adapter:
        key = self._own(parse_adapter(request.name))
        percent = request.canary_percent
        if not 0 <= percent <= 100:
            raise InvalidArgumentError(
                f"canary_percent is 1 to 99, or 0 or 100 for all traffic; not {percent}",
                metadata={"field": "canary_percent"},
            )
        version = await self._threads.run(self._store.version, VersionKey(*key, request.version))
        # Loaded before it is routed to, so that the first request does not wait for it.
        await self._programs.prepare(version)
        return await self._changed(key, lambda: self._store.promote(key, request.version, canary_percent=percent % 100))

    async def RollbackAdapter(self, request: pb.RollbackAdapterRequest, context: Context) -> pb.Adapter:
        key = self._own(parse_adapter(request.name))
        return await self._changed(key, lambda: self._store.rollback(key))

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Context) -> Empty:
        key = self._own(parse_adapter(request.name))

        async def delete() -> None:
            async with self._events.lock:
                record = await self._threads.run(self._store.adapter, key)
                await self._threads.run(self._store.delete_adapter, key)
                event = pb.AdapterEvent(type=pb.AdapterEvent.DELETED, adapter=adapter_message(record))
                self._events.publish(key, event)
            await self._pins.remove(key)

        await run_to_completion(delete())
        return Empty()

    async def DeleteAdapterVersion(self, request: pb.DeleteAdapterVersionRequest, context: Context) -> Empty:
        key = self._own_version(request.name)

        async def delete() -> None:
            await self._threads.run(self._store.delete_version, key)
            await self._publish(pb.AdapterEvent.VERSION_DELETED, key.parent, key.number)

        await run_to_completion(delete())
        return Empty()

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: Context) -> pb.Adapter:
        key = self._own(parse_adapter(request.name))
        adapter = await self._threads.run(self._store.adapter, key)
        await self._pins.add(adapter)
        try:
            return await self._changed(key, lambda: self._store.pin(key, True))
        except NotFoundError:  # it was deleted meanwhile
            await self._pins.remove(key)
            raise

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.Adapter:
        key = self._own(parse_adapter(request.name))

        async def unpin() -> pb.Adapter:
            changed = await self._change(key, lambda: self._store.pin(key, False))
            await self._pins.remove(key)
            return changed

        return await run_to_completion(unpin())

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncGenerator[pb.AdapterEvent]:
        tenant, adapter = self._watched(request.parent)
        with self._events.subscribe(tenant, adapter) as subscription:
            async for record in self._current(tenant, adapter):
                yield pb.AdapterEvent(type=pb.AdapterEvent.STATE, adapter=adapter_message(record))
            async for event in subscription.events():
                yield event

    async def _changed(self, key: AdapterKey, change: Callable[[], AdapterRecord]) -> pb.Adapter:
        """Changes an adapter and publishes the event, also if the caller cancels meanwhile."""
        return await run_to_completion(self._change(key, change))

    async def _change(self, key: AdapterKey, change: Callable[[], AdapterRecord]) -> pb.Adapter:
        record = await self._threads.run(change)
        if record.pinned and not self._pins.holds(record):
            await self._pins.follow(record)
        await self._publish(pb.AdapterEvent.UPDATED, key)
        return self._message(record)

    async def _load(self, version: VersionRecord) -> None:
        """Loads a version that was just stored, if its adapter serves it; if that fails, its first request loads it."""
        await self._pins.retry(version.compiled.digest)
        try:
            adapter = await self._threads.run(self._store.adapter, version.key.parent)
            if adapter.serving != version.key.number:
                return
            await (self._pins.follow(adapter) if adapter.pinned else self._programs.prepare(version))
        except DeltamuxError as error:
            log.warning("%s is stored, but not in the engine's memory yet: %s", version.key, error.message)

    def _message(self, record: AdapterRecord) -> pb.Adapter:
        return adapter_message(record, self._pins.problems.get(record.key, ""))

    async def _publish(self, kind: pb.AdapterEvent.Type.ValueType, key: AdapterKey, number: int = 0) -> None:
        async with self._events.lock:
            try:
                record = await self._threads.run(self._store.adapter, key)
            except NotFoundError:
                return  # deleted meanwhile, and DELETED is published
            self._events.publish(key, pb.AdapterEvent(type=kind, adapter=adapter_message(record), version=number))

    async def _current(self, tenant: str, adapter: str | None) -> AsyncIterator[AdapterRecord]:
        if adapter is not None:
            key = AdapterKey(tenant, adapter)
            yield await self._threads.run(self._store.adapter, key)
            return
        after = ""
        while page := await self._threads.run(self._store.adapters, tenant, after=after):
            for record in page:
                yield record
            after = page[-1].key.adapter

    def _watched(self, parent: str) -> tuple[str, str | None]:
        if "/adapters/" in parent:
            key = self._own(parse_adapter(parent, "parent"))
            return key.tenant, key.adapter
        return self._own_tenant(parent), None

    def _own(self, key: AdapterKey) -> AdapterKey:
        current_caller().check_may_see(key.tenant, str(key))
        return key

    def _own_version(self, name: str) -> VersionKey:
        key = parse_version(name)
        current_caller().check_may_see(key.tenant, name)
        return key

    def _own_tenant(self, parent: str) -> str:
        tenant = parse_tenant(parent, "parent")
        current_caller().check_may_see(tenant, parent)
        return tenant
