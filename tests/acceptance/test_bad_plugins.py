"""Other people's plugins hang at import and at upload, in a real server: streams and good uploads are not affected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deltamux.errors import PluginCrashedError, PluginError, PluginTimeoutError
from deltamux_testing.server_process import ServerProcess, streaming
from deltamux_testing.third_party import install, method, write_adapter

PLUGINS = {
    "hangs_early": "import time; time.sleep(1000)",
    "leaves_early": "import os; os._exit(0)",
    "spins": method("spins", "while True: pass"),
    "leaves": method("leaves", "os._exit(7)"),
    "good": method("good"),
}


@pytest.fixture(scope="module")
def plagued(
    base_directory: Path, tmp_path_factory: pytest.TempPathFactory, real_engine: None
) -> Iterator[ServerProcess]:
    """A server with bad plugins and good ones."""
    root = tmp_path_factory.mktemp("plagued")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(install(root / "site", PLUGINS)))
        process = ServerProcess(base_directory, root / "store", "--plugin-timeout-seconds", "5")
    yield process
    assert process.stop() == 0, "the server must drain and end well on SIGTERM"


@pytest.mark.parametrize(("name", "kind"), [("spins", PluginTimeoutError), ("leaves", PluginCrashedError)])
def test_a_stream_runs_on_while_a_plugin_hangs_or_exits(
    name: str, kind: type[PluginError], plagued: ServerProcess, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with plagued.client() as client:
        with streaming(client) as streams:
            with pytest.raises(kind, match=f"'{name}': deltamux_program"):
                client.upload_adapter(f"tenants/mallory/adapters/{name}", write_adapter(tmp_path / name, name))
            version = client.upload_adapter(f"tenants/acme/adapters/{name}", adapters["lora-1"])
            own = client.upload_adapter(f"tenants/acme/adapters/own-{name}", write_adapter(tmp_path / "good", "good"))
        assert (version.method, own.method) == ("lora", "good")
        assert client.generate([5, 6, 7], adapter=f"tenants/acme/adapters/{name}", max_tokens=4).token_ids
        assert client.list_adapters("tenants/mallory") == []
    assert len(streams) > 1


def test_a_plugin_that_is_left_out_is_named_in_the_log(plagued: ServerProcess) -> None:
    log = plagued.log()
    assert "left out: plugin 'hangs_early': its import took more than 5 s" in log
    assert "left out: plugin 'leaves_early': its import ended its process with exit status 0" in log
