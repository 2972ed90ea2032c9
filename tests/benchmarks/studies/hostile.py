"""Requests that cost their sender little and could cost others much, and the process that sends them.

Each entry of `INPUTS` is one kind: it sends again and again, a few at once, until its time is over. Run as ``python -m
benchmarks.studies.hostile ADDRESS KIND SECONDS``; it prints what came back, counted by status and reason, as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from deltamux.client import AsyncClient
from deltamux.errors import DeltamuxError
from deltamux.v1 import adapters_pb2

AT_ONCE = 4
LARGE = 7_000_000
"""Bytes of the largest fields: below what a message may have."""

Send = Callable[[AsyncClient, int], Awaitable[object]]
"""Sends one request, the n-th of its kind."""


def generation(prompt: Any = "hello", **sampling: Any) -> Send:
    """Returns what sends one generation; an option that is a function gets the request's number."""

    async def send(client: AsyncClient, number: int) -> object:
        given = {name: value(number) if callable(value) else value for name, value in sampling.items()}
        return await client.generate(prompt, **({"max_tokens": 4} | given), timeout=3.0)

    return send


def nested(levels: int) -> str:
    return '{"type":"object","properties":{"a":' * levels + '{"type":"integer"}' + "}}" * levels


def wide(number: int, outer: int = 90, inner: int = 20) -> str:
    """Optional properties within optional properties: a grammar that takes long to compile, another for each number."""
    leaf = {"type": "object", "properties": {f"q{n}": {"type": "string"} for n in range(inner)}}
    return json.dumps({"type": "object", "properties": {f"p{number}{n}": leaf for n in range(outer)}})


def header_bomb(header: bytes) -> Send:
    """Returns what uploads an adapter whose tensors file begins with this header."""
    files = {
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}).encode(),
        "adapter_model.safetensors": struct.pack("<Q", len(header)) + header + bytes(8),
    }

    async def send(client: AsyncClient, number: int) -> object:
        with tempfile.TemporaryDirectory() as directory:
            for name, content in files.items():
                (Path(directory) / name).write_bytes(content)
            return await client.upload_adapter(f"tenants/acme/adapters/bomb-{number % 8}", directory, timeout=20.0)

    return send


async def large_labels(client: AsyncClient, number: int) -> object:
    labels = {f"key-{n}": "x" * 700 for n in range(LARGE // 700)}
    return await upload(client, adapters_pb2.UploadHeader(adapter="tenants/acme/adapters/labels", labels=labels))


async def stalled_upload(client: AsyncClient, number: int) -> object:
    """Announces an adapter, sends the header alone, and then nothing."""
    files = [
        adapters_pb2.FileInfo(path=name, size_bytes=1000)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    header = adapters_pb2.UploadHeader(adapter=f"tenants/acme/adapters/stalled-{number % 16}", files=files)
    return await upload(client, header, silence=5.0)


async def upload(client: AsyncClient, header: adapters_pb2.UploadHeader, silence: float = 0.0) -> object:
    async def messages() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
        yield adapters_pb2.UploadAdapterRequest(header=header)
        await asyncio.sleep(silence)

    from deltamux.client.calls import Call, read_version

    return await client._unary(Call("Adapters.UploadAdapter", messages(), read_version, timeout=10.0))


async def burst(client: AsyncClient, number: int) -> object:
    calls = [client.generate("hello", max_tokens=1, timeout=20.0) for _ in range(500)]
    return await asyncio.gather(*calls, return_exceptions=True)


TENSORS = b",".join(
    b'"t%d":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}' % (n, 4 * n, 4 * n + 4) for n in range(200_000)
)
INPUTS: dict[str, Callable[[], Send]] = {
    "20,000 choices": lambda: generation(choice=[f"option {n}" for n in range(20_000)]),
    "1,000 other choices each time": lambda: generation(choice=lambda n: [f"option {n}.{m}" for m in range(1000)]),
    "$ref cycle": lambda: generation(json_schema='{"$ref": "#"}'),
    "schema 400 deep": lambda: generation(json_schema=nested(400)),
    "another wide schema each time": lambda: generation(json_schema=wide),
    "another regex each time": lambda: generation(regex=lambda n: f"(([a-z]{{1,{n % 900 + 50}}}[0-9]?)+x){{40}}"),
    "100,000 stop strings": lambda: generation(stop=[f"stop {n}" for n in range(100_000)]),
    "1,000,000 stop ids": lambda: generation(stop_token_ids=list(range(1_000_000))),
    "7 MB of text": lambda: generation("a" * LARGE),
    "7 MB of chat": lambda: generation([{"role": "user", "content": "word " * (LARGE // 5)}]),
    "900,000 token ids": lambda: generation([5] * 900_000),
    "7 MB of labels": lambda: large_labels,
    "header: 200,000 tensors": lambda: header_bomb(b"{" + TENSORS + b"}"),
    "header: 1,000,000 dimensions": lambda: header_bomb(
        b'{"t":{"dtype":"F32","shape":[' + b"[0]," * 1_000_000 + b'0],"data_offsets":[0,4]}}'
    ),
    "header: nested 10,000 deep": lambda: header_bomb(b'{"t":' * 10_000 + b"0" + b"}" * 10_000),
    "2,000 calls at once": lambda: burst,
    "stalled uploads": lambda: stalled_upload,
}


async def attack(address: str, kind: str, seconds: float) -> Counter[str]:
    send, until, numbers = INPUTS[kind](), time.monotonic() + seconds, itertools.count(os.getpid() % 1000 * 1000)
    seen: Counter[str] = Counter()

    async def again() -> None:
        async with AsyncClient(address) as client:
            while time.monotonic() < until:
                outcomes = await outcome_of(send(client, next(numbers)))
                seen.update(outcomes)

    await asyncio.gather(*(again() for _ in range(AT_ONCE)))
    return seen


async def outcome_of(call: Awaitable[object]) -> Sequence[str]:
    """Returns the statuses and reasons of a request, or of a burst of them."""
    try:
        answer = await call
    except DeltamuxError as error:
        answer = error
    answers = answer if isinstance(answer, list) else [answer]
    return [f"{a.status} {a.reason}" if isinstance(a, DeltamuxError) else type(a).__name__ for a in answers]


if __name__ == "__main__":
    print("begins", flush=True)
    print(json.dumps(asyncio.run(attack(sys.argv[1], sys.argv[2], float(sys.argv[3])))))
