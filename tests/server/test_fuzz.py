"""No call, whatever its content, ends with an internal error or changes the results of others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from deltamux.client import AsyncClient
from deltamux.server.app import SERVICES
from deltamux_testing.servers import Served
from fuzz.messages import ADAPTER, METHODS
from fuzz.rpcs import Known, drawn, send

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", range(4))
async def test_random_calls_are_answered_and_change_no_other_answer(
    number: int, served: Served, client: AsyncClient, loras: list[Path]
) -> None:
    served.engine.step_seconds = 0.0
    known = Known(client)
    await known.learn()
    batch = drawn(number, 100)
    async with grpc.aio.insecure_channel(served.address) as channel:
        for start in range(0, len(batch), 20):
            part = batch[start : start + 20]
            await client.upload_adapter(ADAPTER, loras[0])  # the calls delete it
            await asyncio.gather(*(send(channel, name, raw, seconds=1.5) for name, raw in part))
            await known.check()


def test_every_service_of_the_server_is_called() -> None:
    assert {name.partition("/")[0] for name in METHODS} == set(SERVICES)
