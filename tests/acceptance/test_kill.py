"""kill -9 at any instant: what was acknowledged is there after a restart, what was not is gone."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from adapters import write_own

from acceptance.process import ServerProcess
from deltamux.client import Client
from deltamux.deltas import BaseModel
from deltamux.errors import UnavailableError

NAME = "tenants/acme/adapters/main"


def test_what_was_acknowledged_survives_kill_dash_nine(
    base_directory: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    server = ServerProcess(base_directory, store)
    uploaded: list[str] = []
    made = write_loras(base_directory, tmp_path / "made")
    server_kill(server, 0.7, uploaded, lambda client: keep_uploading(client, made, uploaded))

    server = ServerProcess(base_directory, store)
    with server.client() as client:
        check_store(client, store, uploaded)
        first = client.upload_adapter(NAME, adapters["lora-1"])
        second = client.upload_adapter(NAME, adapters["houlsby-1"])
        answers = {
            v.version: client.generate([5, 6], adapter=v.name, max_tokens=8, temperature=0).token_ids
            for v in (first, second)
        }
    promoted: list[int] = []
    server_kill(server, 0.3, promoted, lambda client: keep_promoting(client, [first.version, second.version], promoted))

    server = ServerProcess(base_directory, store)
    with server.client() as client:
        serving = client.get_adapter(NAME).serving_version
        # The last promotion may have been made without its answer reaching anybody.
        assert serving in (promoted[-1], 3 - promoted[-1])
        assert answer(client, NAME) == answers[serving]
        check_store(client, store, uploaded)
    assert server.stop() == 0


def answer(client: Client, name: str) -> tuple[int, ...]:
    return client.generate([5, 6], adapter=name, max_tokens=8, temperature=0).token_ids


def server_kill(
    server: ServerProcess, seconds: float, results: Sequence[object], work: Callable[[Client], None]
) -> None:
    """Runs work against a server and kills the server `seconds` after its first result."""

    def run() -> None:
        with server.client() as client:
            work(client)

    thread = threading.Thread(target=run)
    thread.start()
    while not results and thread.is_alive():
        time.sleep(0.01)
    time.sleep(seconds)
    server.kill()
    thread.join(timeout=60)
    assert not thread.is_alive()


def write_loras(base_directory: Path, directory: Path) -> list[Path]:
    base = BaseModel.from_pretrained(base_directory)
    return [write_own("lora", base, directory / str(seed), seed=seed, r=16) for seed in range(40)]


def keep_uploading(client: Client, made: Sequence[Path], uploaded: list[str]) -> None:
    with suppress(UnavailableError):
        for number in itertools.count():
            name = f"tenants/acme/adapters/a{number}"
            version = client.upload_adapter(name, made[number % len(made)]).name
            if number % 3 == 0:
                client.delete_adapter(name)
            else:
                uploaded.append(version)


def keep_promoting(client: Client, versions: list[int], promoted: list[int]) -> None:
    with suppress(UnavailableError):
        for version in itertools.cycle(versions):
            client.promote(NAME, version=version)
            promoted.append(version)


def check_store(client: Client, store: Path, uploaded: list[str]) -> None:
    """Every acknowledged version serves; nothing is staged; every object is whole."""
    assert uploaded, "something must have been acknowledged, or this test could not fail"
    for name in uploaded[-5:]:
        assert client.generate([5, 6, 7], adapter=name, max_tokens=2).adapter_version == name
    for name in uploaded:
        assert client.get_adapter_version(name).state == "READY"
    assert list((store / "staging").iterdir()) == []
    for directory in (store / "objects").glob("*/*"):
        assert (directory / "program.safetensors").is_file()
