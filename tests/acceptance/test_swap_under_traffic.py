"""Adapters are uploaded, promoted and deleted while sixteen streams run, which do not change."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deltamux.client import Client
from deltamux.errors import NotFoundError
from deltamux_testing.server_process import ServerProcess

STREAMS = 16
CHANGES = 100
TOKENS = 60
"""That a stream generates: more than three times what is generated right after a change."""

PROMPT = (5, 17, 99, 200, 3)
SOME_MEMORY = 200 << 20
"""What the processes may differ by in resident memory, in bytes: allocators keep some."""


def greedy(client: Client, adapter: str | None, num_tokens: int, start: int = 0) -> list[int]:
    prompt = [*PROMPT, start + 3]
    options = {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
    return [t for chunk in client.generate_stream(prompt, adapter=adapter, **options) for t in chunk.token_ids]


def resident_bytes(server: ServerProcess) -> int:
    return sum(worker.memory_info().rss for worker in server.workers())


def test_sixteen_streams_outlive_a_hundred_changes(
    server: ServerProcess, client: Client, adapters: dict[str, Path]
) -> None:
    pinned = {
        kind: client.upload_adapter(f"tenants/steady/adapters/{kind}", directory).name
        for kind, directory in adapters.items()
    }
    alone = {kind: greedy(client, name, 16) for kind, name in pinned.items()}
    assert len(set(map(tuple, alone.values()))) == len(alone), "every adapter must answer differently"
    jobs = list(itertools.islice(itertools.cycle([*pinned.values(), None]), STREAMS))
    expected = [greedy(client, name, TOKENS, i) for i, name in enumerate(jobs)]
    before = resident_bytes(server)
    done = threading.Event()

    def stream(i: int) -> int:
        rounds = 0
        while not done.is_set() or not rounds:
            assert greedy(client, jobs[i], TOKENS, i) == expected[i], f"stream {i} changed"
            rounds += 1
        return rounds

    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(stream, i) for i in range(STREAMS)]
        try:
            change_adapters(client, adapters, alone)
        finally:
            done.set()
        assert all(s.result() >= 1 for s in streams)
    for adapter in client.list_adapters("tenants/moving"):
        client.delete_adapter(adapter.name)
    assert resident_bytes(server) - before < SOME_MEMORY


def change_adapters(client: Client, adapters: dict[str, Path], alone: dict[str, list[int]]) -> None:
    """A hundred uploads, promotions, rollbacks and deletions; each answer right after one is the new version's."""
    rng = random.Random(0)
    versions: dict[str, dict[str, int]] = {}
    for _ in range(CHANGES):
        name = f"tenants/moving/adapters/a{rng.randrange(5)}"
        kind = rng.choice(list(adapters))
        known = versions.setdefault(name, {})
        action = rng.choice(["upload", "promote", "delete"])
        if action == "delete" and known:
            client.delete_adapter(name)
            versions[name] = {}
            with pytest.raises(NotFoundError):
                client.generate(list(PROMPT), adapter=name, max_tokens=1)
            continue
        if action == "promote" and kind in known:
            client.promote(name, version=known[kind])
        else:
            known[kind] = client.upload_adapter(name, adapters[kind], promote=True).version
        assert greedy(client, name, 16) == alone[kind], f"{name} must answer as its new version at once"


def test_a_canary_gets_its_share_and_a_rollback_ends_it(client: Client, adapters: dict[str, Path]) -> None:
    name = "tenants/steady/adapters/canary"
    client.upload_adapter(name, adapters["lora-1"])
    second = client.upload_adapter(name, adapters["lora-2"])
    client.promote(name, version=second.version, canary_percent=50)
    served = [client.generate(list(PROMPT), adapter=name, max_tokens=1).adapter_version for _ in range(40)]
    assert 5 <= served.count(second.name) <= 35
    client.rollback(name)
    served = [client.generate(list(PROMPT), adapter=name, max_tokens=1).adapter_version for _ in range(20)]
    assert second.name not in served


def test_the_uploaders_files_are_not_needed_any_more(client: Client, adapters: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(adapters["lora-1"], tmp_path / "copy"))
    name = client.upload_adapter("tenants/steady/adapters/copied", copy).name
    before = greedy(client, name, 8)
    shutil.rmtree(copy)
    assert greedy(client, name, 8) == before
