"""The clients' retries over a real socket: of temporary refusals, and of nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.client import AsyncClient, Client
from deltamux.client.calls import Call
from deltamux.client.retrying import MAX_PAUSE, Attempts
from deltamux.errors import (
    DeadlineExceededError,
    DeltamuxError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from deltamux_testing.servers import Served, Servers
from deltamux_testing.stalled_uploads import StalledUploads

NAME = "tenants/acme/adapters/tickets"
SHORT: dict[str, Any] = {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True}
LONG: dict[str, Any] = {**SHORT, "max_tokens": 300}


@pytest.fixture
async def narrow(serve: Servers) -> AsyncIterator[Served]:
    """A server with one permit of each kind."""
    async with serve(max_pending_requests=1, max_concurrent_uploads=1, step_seconds=0.02) as server:
        yield server


@pytest.mark.slow
async def test_generations_beyond_the_limit_are_sent_again_until_they_are_served(narrow: Served) -> None:
    async with AsyncClient(narrow.address, timeout=60, retries=20) as client:
        whole = await asyncio.gather(*(client.generate("x", **SHORT) for _ in range(4)))
        assert [len(each.token_ids) for each in whole] == [2] * 4

    def threads() -> int:
        with Client(narrow.address, timeout=60, retries=20) as client:
            return len(client.generate("x", **SHORT).token_ids) + len(list(client.generate_stream("x", **SHORT)))

    assert await asyncio.gather(*(asyncio.to_thread(threads) for _ in range(2))) == [4, 4]


async def test_a_stream_is_sent_again_before_its_first_token(narrow: Served) -> None:
    async with AsyncClient(narrow.address, timeout=60) as client:
        async with aclosing(client.generate_stream("x", **LONG)) as first:  # type: ignore[type-var]  # a generator
            async for _ in first:
                break
            refused = asyncio.create_task(tokens(client))
            await asyncio.sleep(0.3)
            assert not refused.done()
        assert await refused == 2


async def tokens(client: AsyncClient) -> int:
    return sum([len(chunk.token_ids) async for chunk in client.generate_stream("x", **SHORT)])


async def test_the_callers_timeout_holds_for_all_attempts_together_and_no_retries_means_none(
    narrow: Served,
) -> None:
    async with AsyncClient(narrow.address, timeout=60) as client, AsyncClient(narrow.address, retries=0) as other:
        under_way = asyncio.create_task(client.generate("x", **LONG))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        with pytest.raises(ResourceExhaustedError) as refused:
            await other.generate("x", **SHORT)
        assert refused.value.reason == "SERVER_BUSY"
        assert refused.value.retry_after is not None
        assert time.monotonic() - began < 1
        with pytest.raises((ResourceExhaustedError, DeadlineExceededError)):
            await client.generate("x", timeout=1.5, **SHORT)
        assert time.monotonic() - began < 4
        under_way.cancel()


@pytest.mark.slow
async def test_an_upload_that_is_refused_is_sent_again_from_its_beginning(narrow: Served, loras: list[Path]) -> None:
    reported: list[int] = []
    async with StalledUploads(narrow.address, loras[0]) as stalled, AsyncClient(narrow.address, timeout=60) as client:
        await stalled.begin(9, NAME)
        with pytest.raises(ResourceExhaustedError):
            async with AsyncClient(narrow.address, timeout=60, retries=0) as other:
                await other.upload_adapter(NAME, loras[0])
        uploading = asyncio.create_task(
            client.upload_adapter(NAME, loras[0], progress=lambda sent, total: reported.append(sent))
        )
        await asyncio.sleep(0.4)
        assert not uploading.done()
        await stalled.__aexit__()
        assert (await uploading).state == "READY"
    assert reported[-1] == sum(
        (loras[0] / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors", "README.md")
    )


def attempts(retries: int = 4, timeout: float | None = None, **kind: bool) -> Attempts:
    return Attempts(Call("Adapters.Anything", None, str, **kind), retries, timeout)  # type: ignore[arg-type]  # flags


def test_what_may_have_been_done_is_not_sent_again() -> None:
    later = ResourceExhaustedError("busy", retry_after=1.0)
    assert attempts().pause(later) is None
    assert attempts(retry_refused=True).pause(later) is not None
    assert attempts(idempotent=True).pause(later) is not None
    lost = UnavailableError("not reached")
    assert attempts(retry_refused=True).pause(lost) is None
    assert attempts(idempotent=True).pause(lost) is not None
    for final in (ResourceExhaustedError("quota"), NotFoundError("none"), DeadlineExceededError("late")):
        assert attempts(idempotent=True).pause(final) is None


@given(st.lists(st.none() | st.floats(0.01, 90), max_size=12), st.integers(0, 8), st.none() | st.floats(0.1, 100))
def test_pauses_are_no_shorter_than_retry_info_and_never_beyond_the_bounds(
    retry_times: list[float | None], retries: int, timeout: float | None
) -> None:
    trying, paused, count = attempts(retries, timeout, idempotent=True), 0.0, 0
    for retry_after in retry_times:
        error: DeltamuxError = UnavailableError("later", retry_after=retry_after)
        if (pause := trying.pause(error)) is None:
            break
        paused, count = paused + pause, count + 1
        assert pause >= (retry_after or 0.2)
    assert count <= retries
    assert paused <= MAX_PAUSE
    if timeout is not None and count == 1:
        assert paused < timeout
