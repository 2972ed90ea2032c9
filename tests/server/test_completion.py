"""Callers that are cancelled while the store changes: the change is complete, and watches receive it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deltamux.client import AsyncClient
from deltamux.errors import DeltamuxError
from deltamux.server.transport.completion import run_to_completion
from deltamux.store.inspection import inspect
from deltamux.store.objects import ObjectStore
from deltamux.store.store import AdapterStore
from deltamux_testing.servers import Served
from deltamux_testing.waiting import until

NAME = "tenants/acme/adapters/tickets"


class Slow:
    """Makes a method of the store take a while, and sets an event when it begins."""

    def __init__(self, owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = False
        method: Any = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.begun = True
            time.sleep(0.5)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    async def cancelled(self, call: Awaitable[Any]) -> None:
        """Begins a call, and cancels it while the method runs."""
        task = asyncio.ensure_future(call)
        await until(lambda: self.begun)
        task.cancel()
        with suppress(asyncio.CancelledError, DeltamuxError):
            await task


async def watched(client: AsyncClient, events: list[tuple[str, int | None]]) -> asyncio.Task[None]:
    async def watch() -> None:
        async for event in client.watch_adapters("tenants/acme"):
            events.append((event.type, event.version))  # noqa: PERF401 - looked at meanwhile

    task = asyncio.create_task(watch())
    await until(lambda: events)  # the first is the sign that the watch has begun
    return task


async def test_an_upload_that_is_cancelled_while_it_is_stored_is_stored_whole(
    served: Served, client: AsyncClient, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.upload_adapter(NAME, loras[0])
    events: list[tuple[str, int | None]] = []
    watching = await watched(client, events)
    await Slow(ObjectStore, "put", monkeypatch).cancelled(client.upload_adapter(NAME, loras[1]))
    monkeypatch.undo()
    await until(lambda: len(events) > 1)
    assert [version.version for version in await client.list_adapter_versions(NAME)] == [1, 2]
    assert ("VERSION_CREATED", 2) in events
    report = await asyncio.to_thread(inspect, served.store.root)
    assert not report.findings
    assert not list((served.store.root / "staging").iterdir())
    watching.cancel()


CHANGES: dict[str, tuple[Callable[[AsyncClient], Awaitable[Any]], tuple[str, int | None]]] = {
    "promote": (lambda client: client.promote(NAME, version=2), ("UPDATED", None)),
    "rollback": (lambda client: client.rollback(NAME), ("UPDATED", None)),
    "pin": (lambda client: client.pin_adapter(NAME), ("UPDATED", None)),
    "delete_version": (lambda client: client.delete_adapter(f"{NAME}/versions/1"), ("VERSION_DELETED", 1)),
    "delete_adapter": (lambda client: client.delete_adapter(NAME), ("DELETED", None)),
    "delete_tenant": (lambda client: client.delete_tenant("tenants/acme", force=True), ("DELETED", None)),
}


@pytest.mark.parametrize("method", CHANGES)
async def test_watches_receive_a_change_whose_caller_was_cancelled(
    method: str, client: AsyncClient, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.upload_adapter(NAME, loras[0])
    await client.upload_adapter(NAME, loras[1], promote=True)
    events: list[tuple[str, int | None]] = []
    watching = await watched(client, events)
    change, event = CHANGES[method]
    await Slow(AdapterStore, method, monkeypatch).cancelled(change(client))
    await until(lambda: len(events) > 1)
    assert events[1:] == [event]
    watching.cancel()


async def test_work_that_is_cancelled_twice_ends_before_its_caller() -> None:
    order: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        order.append("work")

    async def call() -> None:
        try:
            await run_to_completion(work())
        finally:
            order.append("caller")

    task = asyncio.create_task(call())
    for _ in range(2):
        await asyncio.sleep(0.01)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["work", "caller"]
