"""Routing of a request: from an adapter's name to the program that serves it, leased while the request runs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from deltamux.engine.base import ProgramRef
from deltamux.server.access.caller import current_caller
from deltamux.server.programs import Programs
from deltamux.server.rpc.names import parse_adapter_or_version
from deltamux.store import AdapterStore


class Target(NamedTuple):
    """The version that serves a request: its name and program; "" and None for the base."""

    name: str
    program: ProgramRef | None


BASE = Target("", None)


class Router:
    """Resolution of names, with the present caller's permissions."""

    def __init__(self, store: AdapterStore, programs: Programs) -> None:
        self._store = store
        self._programs = programs

    def tenant_of(self, adapter: str) -> str:
        """Returns the tenant that a request counts for: its adapter's, or the caller's if it is for the base.

        Raises:
            NotFoundError: the adapter is another tenant's.
        """
        caller = current_caller()
        if not adapter:
            return caller.tenant or ""
        key = parse_adapter_or_version(adapter, "adapter")
        caller.check_may_see(key.tenant, adapter)
        return key.tenant

    @asynccontextmanager
    async def lease(self, adapter: str, request_key: str) -> AsyncIterator[Target]:
        """Resolves a name once and leases its version for the length of the block.

        Args:
            adapter: resource name of an adapter or a version; "" for the base.
            request_key: decides whether a canary serves the request.
        Raises:
            NotFoundError: no such adapter, or another tenant's.
            DataLossError, FailedPreconditionError: see `Programs.using`.
        """
        if not adapter:
            yield BASE
            return
        key = parse_adapter_or_version(adapter, "adapter")
        current_caller().check_may_see(key.tenant, adapter)
        with self._store.lease(key, request_key) as record:
            async with self._programs.using(record) as program:
                yield Target(str(record.key), program)
