"""An engine that dies or hangs is restarted, or ends the server, by `--on-engine-death`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltamux.client import AsyncClient
from deltamux.engine.base import ProgramRef
from deltamux.engine.supervisor import RestartPolicy, SupervisedEngine
from deltamux.errors import FailedPreconditionError, UnavailableError
from deltamux_testing.reference_engine import ReferenceEngine
from deltamux_testing.servers import Served, Servers
from deltamux_testing.waiting import until

NAME = "tenants/acme/adapters/tickets"
GREEDY: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
FAST = RestartPolicy(first_delay=0.02, check_interval=0.01, ping_interval=0.02, ping_timeout=0.1, hang_seconds=0.3)


class EngineFactory:
    """Makes one engine after the other, and keeps them all.

    Attributes:
        broken: how many of the next engines do not start.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.engines: list[ReferenceEngine] = []
        self.broken = 0

    def __call__(self, *_: object) -> ReferenceEngine:
        engine = ReferenceEngine(self.base, step_seconds=0.02)
        if self.broken:
            self.broken -= 1
            engine.refuse_to_start()
        self.engines.append(engine)
        return engine


@pytest.fixture
def factory(tiny_base: Path) -> EngineFactory:
    return EngineFactory(tiny_base)


@pytest.fixture
async def supervised(factory: EngineFactory, serve: Servers) -> AsyncIterator[tuple[Served, AsyncClient]]:
    async with serve(factory, engine_restart_seconds=0.3) as server, server.client() as client:
        yield server, client


async def test_a_call_that_fails_before_the_crash_is_noticed_is_answered_that_the_engine_is_down(
    supervised: tuple[Served, AsyncClient],
    factory: EngineFactory,
    loras: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, client = supervised
    await client.upload_adapter(NAME, loras[0])
    dying = factory.engines[0]

    async def fails(program: ProgramRef) -> None:
        asyncio.get_running_loop().call_later(0.3, dying.crash)
        raise Exception("Call to collective_rpc method failed: cancelled")

    monkeypatch.setattr(dying, "prepare", fails)
    with pytest.raises(UnavailableError) as refused:
        await client.promote(NAME, version=1)
    assert refused.value.retry_after is not None


async def test_a_dead_engine_is_replaced_and_what_was_pinned_is_pinned_again(
    supervised: tuple[Served, AsyncClient], factory: EngineFactory, loras: list[Path]
) -> None:
    server, client = supervised
    version = await client.upload_adapter(NAME, loras[0])
    await client.pin_adapter(NAME)
    before = await client.generate("hello", adapter=NAME, **GREEDY)
    under_way = asyncio.create_task(
        whole(client.generate_stream("hello", adapter=NAME, max_tokens=300, ignore_eos=True))
    )
    async with watched(server) as status:
        assert await status() == SERVING
        await until(lambda: factory.engines[0].running)
        factory.engines[0].crash()
        with pytest.raises(UnavailableError) as ended:
            await under_way
        assert await status() == NOT_SERVING
        assert await status() == SERVING
    assert ended.value.retry_after is not None
    assert ended.value.retry_after >= 1.0
    assert (await client.generate("hello", adapter=NAME, **GREEDY)).token_ids == before.token_ids
    assert len(factory.engines) == 2
    await until(lambda: factory.engines[1].pinned == {version.digest})


async def test_while_the_engine_is_down_the_rest_of_the_server_answers(
    supervised: tuple[Served, AsyncClient], factory: EngineFactory, loras: list[Path]
) -> None:
    _, client = supervised
    await client.upload_adapter(NAME, loras[0])
    factory.broken = 1
    factory.engines[0].crash()
    with pytest.raises(UnavailableError):
        await whole(client.generate_stream("hello", **GREEDY))
    assert (await client.get_adapter(NAME)).serving_version == 1
    await until(lambda: len(factory.engines) == 3 and factory.engines[2].healthy)
    assert len((await client.generate("hello", **GREEDY)).token_ids) == 4


async def test_an_engine_that_hangs_is_ended_and_replaced_and_questions_to_it_end(factory: EngineFactory) -> None:
    engine = SupervisedEngine(factory(), factory, FAST)
    await engine.start()
    factory.engines[0].hang()
    asking = asyncio.create_task(engine.ping())
    await until(lambda: not engine.healthy)
    assert factory.engines[0].healthy, "an engine that may be in a long step must not be ended at once"
    with pytest.raises(UnavailableError):
        await asking
    await until(lambda: len(factory.engines) == 2 and engine.healthy)
    assert not factory.engines[0].healthy, "the old engine must have been ended before the new one starts"
    await engine.ping()
    await engine.stop()


async def test_pauses_between_restarts_grow_and_crashes_beyond_the_limit_end_the_engine(
    factory: EngineFactory,
) -> None:
    policy = RestartPolicy(restarts=3, first_delay=0.1, check_interval=0.01)
    engine = SupervisedEngine(factory(), factory, policy)
    await engine.start()
    factory.broken = 99
    began = asyncio.get_running_loop().time()
    factory.engines[0].crash()
    reason = await asyncio.wait_for(engine.lost(), 30)
    assert asyncio.get_running_loop().time() - began >= 0.1 + 0.2 + 0.4
    assert len(factory.engines) == 4
    assert (reason.reason, "4 times" in reason.message) == ("ENGINE_LOST", True)
    with pytest.raises(UnavailableError):
        await engine.stats()
    await engine.stop()


async def test_a_first_engine_that_does_not_start_ends_the_start(factory: EngineFactory) -> None:
    factory.broken = 1
    engine = SupervisedEngine(factory(), factory, FAST)
    with pytest.raises(FailedPreconditionError):
        await engine.start()
    await engine.stop()
    assert len(factory.engines) == 1


async def whole(stream: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in stream]


@asynccontextmanager
async def watched(server: Served) -> AsyncIterator[Callable[[], Any]]:
    """Yields a function that returns the next status that the health service reports."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        statuses = aiter(stub.Watch(health_pb2.HealthCheckRequest(service="deltamux.v1.Inference")))

        async def following() -> int:
            answer: int = (await asyncio.wait_for(anext(statuses), 30)).status
            return answer

        yield following
