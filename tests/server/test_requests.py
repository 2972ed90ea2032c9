"""Invalid requests are INVALID_ARGUMENT with the field, cost little, and leave short log lines."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from deltamux.client import AsyncClient
from deltamux.errors import InvalidArgumentError
from deltamux.v1 import adapters_pb2, inference_pb2
from deltamux_testing.servers import Served, Servers
from deltamux_testing.tiny_base import CHAT_TEMPLATE

NAME = "tenants/acme/adapters/tickets"


def sampling(**given: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text="x", sampling=inference_pb2.SamplingParameters(**given))


def chat(*turns: tuple[str, str]) -> inference_pb2.GenerateRequest:
    messages = [inference_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    return inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=messages))


GENERATE = ("Inference/Generate", "Inference/GenerateStream")
MISTAKES: dict[str, tuple[Any, str]] = {
    "stop strings": (sampling(stop=["x"] * 100_000), "LIMIT_EXCEEDED"),
    "stop ids": (sampling(stop_token_ids=range(1_000_000)), "LIMIT_EXCEEDED"),
    "choices": (
        sampling(
            structured_output=inference_pb2.StructuredOutput(
                choice=inference_pb2.Choice(options=[f"option {n}" for n in range(20_000)])
            )
        ),
        "LIMIT_EXCEEDED",
    ),
    "stop id beyond": (sampling(stop_token_ids=[10_000_000]), "INVALID_TOKEN"),
    "bias beyond": (sampling(logit_bias={10_000_000: 1.0}), "INVALID_TOKEN"),
    "bias negative": (sampling(logit_bias={-1: 1.0}), "INVALID_TOKEN"),
    "min tokens": (sampling(min_tokens=10**9, fill_context=True), "INVALID_SAMPLING"),
    "text": (inference_pb2.GenerateRequest(text="a" * 1_000_000), "PROMPT_TOO_LONG"),
    "huge text": (inference_pb2.GenerateRequest(text="a" * 7_000_000), "LIMIT_EXCEEDED"),
    "ids": (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(values=[5] * 900_000)), "PROMPT_TOO_LONG"),
    "chat": (chat(("user", "a" * 1_000_000)), "PROMPT_TOO_LONG"),
    "turns": (chat(*[("user", "a")] * 50_000), "LIMIT_EXCEEDED"),
    "no prompt": (inference_pb2.GenerateRequest(), "EMPTY_PROMPT"),
}


async def refusal(channel: grpc.aio.Channel, method: str, raw: bytes) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Sends bytes to a unary or streaming method; returns the status, reason and metadata."""
    from google.rpc import error_details_pb2  # type: ignore[import-untyped]  # its .pyi files come without py.typed

    kind: Any = channel.unary_stream if method.endswith("Stream") else channel.unary_unary
    call: Any = kind(f"/deltamux.v1.{method}")(raw, timeout=20)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await (anext(aiter(call)) if method.endswith("Stream") else call)
    status: Any = rpc_status.from_call(raised.value)  # type: ignore[arg-type]  # it has what is read of a call
    info = error_details_pb2.ErrorInfo()
    assert status is not None, raised.value
    assert status.details[0].Unpack(info)
    return raised.value.code(), info.reason, dict(info.metadata)


@pytest.mark.parametrize("name", MISTAKES)
async def test_a_mistake_in_a_generation_is_refused_at_once(
    name: str, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deltamux.server")
    request, reason = MISTAKES[name]
    async with grpc.aio.insecure_channel(served.address) as channel:
        raw = request.SerializeToString()
        for method in GENERATE:
            started = time.perf_counter()
            code, actual, metadata = await refusal(channel, method, raw)
            assert (code, actual) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
            assert metadata["field"]
            assert time.perf_counter() - started < 2.0
    assert sum(len(record.getMessage()) for record in caplog.records) < 5000


@pytest.mark.parametrize("method", [*GENERATE, "Adapters/GetAdapter", "Tenants/GetTenant"])
async def test_bytes_that_are_not_the_message_are_refused(method: str, served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        for raw in (b"\xff\xff\xff", b"\x0a\x02\xff\xfe"):  # not a message; a name that is not UTF-8
            assert (await refusal(channel, method, raw))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE")


async def test_bytes_that_are_not_the_message_are_refused_in_a_stream_too(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        upload: Any = channel.stream_unary("/deltamux.v1.Adapters/UploadAdapter")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await upload(iter([b"\xff\xff"]), timeout=20)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("token", ["x", "é", "MQ", "OTk5OTk5OTk5OTk5OTk5OTk5OTk=", "LTE=", "4pyT", "A" * 513])
async def test_a_page_token_that_no_page_gave_is_refused(token: str, served: Served, client: AsyncClient) -> None:
    raw = adapters_pb2.ListAdapterVersionsRequest(parent=NAME, page_token=token).SerializeToString()
    async with grpc.aio.insecure_channel(served.address) as channel:
        code, reason, metadata = await refusal(channel, "Adapters/ListAdapterVersions", raw)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert reason in ("INVALID_PAGE_TOKEN", "LIMIT_EXCEEDED")
    assert metadata["field"] == "page_token"


async def test_versions_with_large_labels_are_listed_page_by_page(
    served: Served, client: AsyncClient, loras: Any
) -> None:
    for number in range(2):
        await client.upload_adapter(NAME, loras[number])
    # As a version may have been stored before labels had a bound.
    database = served.store._database
    large = '{"a": "%s"}' % ("b" * 3_000_000)
    with database.transaction():
        database.execute("UPDATE versions SET labels = ?", large)
    assert [version.version for version in await client.list_adapter_versions(NAME)] == [1, 2]


async def test_a_chat_that_the_template_refuses_comes_back_in_its_words(served: Served, client: AsyncClient) -> None:
    tokenizer = served.engine._tokenizer
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuse + CHAT_TEMPLATE
    with pytest.raises(InvalidArgumentError, match="System role not supported") as raised:
        await client.generate([{"role": "system", "content": "be brief"}], max_tokens=1)
    assert (raised.value.reason, raised.value.metadata["field"]) == ("INVALID_CHAT", "prompt.chat")
    await client.generate([{"role": "user", "content": "hello"}], max_tokens=1)


async def test_all_traffic_may_be_given_as_a_hundred_percent(client: AsyncClient, loras: Any) -> None:
    await client.upload_adapter(NAME, loras[0])
    await client.upload_adapter(NAME, loras[1])
    adapter = await client.promote(NAME, version=2, canary_percent=100)
    assert (adapter.serving_version, adapter.canary_percent) == (2, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.generate("lone \ud800 surrogate"),
        lambda client: client.generate([1 << 40]),
        lambda client: client.get_adapter("tenants/\ud800"),
        lambda client: client.generate("x", stop=["\ud800"]),
    ],
)
async def test_what_no_message_can_hold_is_refused_by_the_client(call: Any, client: AsyncClient) -> None:
    with pytest.raises(InvalidArgumentError):
        await call(client)


async def test_others_are_served_while_huge_requests_are_refused(served: Served, client: AsyncClient) -> None:
    """No request, however large, blocks the event loop."""
    raws = [request.SerializeToString() for request, _ in MISTAKES.values()]
    async with grpc.aio.insecure_channel(served.address) as channel:
        attack = [asyncio.create_task(refusal(channel, "Inference/Generate", raw)) for raw in raws * 2]
        longest = 0.0
        while not all(task.done() for task in attack):
            started = time.perf_counter()
            await asyncio.sleep(0.005)  # client and server share this loop
            longest = max(longest, time.perf_counter() - started)
        await asyncio.gather(*attack)
    assert longest < 0.5


@pytest.mark.parametrize("shared", [False, True])
async def test_tenants_share_cached_prompts_only_with_the_option(shared: bool, serve: Servers) -> None:
    async with serve(auth="keys", share_prefix_cache=shared) as server:
        keys = [server.admin_key]
        async with server.client(api_key=server.admin_key) as admin:
            for tenant in ("acme", "globex"):
                await admin.create_tenant(tenant)
                keys.append((await admin.create_api_key(f"tenants/{tenant}")).secret or "")
        for key in [*keys, *keys]:
            async with server.client(api_key=key) as caller:
                await caller.generate("x", max_tokens=1)
    first, again = server.engine.salts[:3], server.engine.salts[3:]
    assert first == again
    assert first == [""] * 3 if shared else (len({*first}) == 3 and all(first))
