"""Uploads that stop before their first byte."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc

from deltamux.client.uploads import upload_messages
from deltamux.v1.adapters_pb2_grpc import AdaptersStub


class StalledUploads:
    """Uploads that send their header, or nothing at all, and no byte of a file."""

    def __init__(self, address: str, adapter: Path) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._adapter = adapter
        self._calls: list[Any] = []

    async def __aenter__(self) -> StalledUploads:
        return self

    async def __aexit__(self, *raised: object) -> None:
        for call in self._calls:
            call.cancel()
        await self._channel.close()

    async def begin(self, count: int, name: str | None = None) -> None:
        for _ in range(count):
            call: Any = AdaptersStub(self._channel).UploadAdapter()
            if name is not None:
                await call.write(next(upload_messages(name, self._adapter)))
            else:
                await call.wait_for_connection()
            self._calls.append(call)
        await asyncio.sleep(0.3)
