"""The options of a server, which the command line has by the same names."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from deltamux.engine.base import EngineOptions
from deltamux.errors import InvalidConfigError
from deltamux.options import DEFAULT_ADDRESS, Option, Range, invalid_option

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """The options of `deltamux serve`: the engine's, and these."""

    store: Annotated[Path, Option("directory of adapters and tenants; made where there is none")]
    listen: Annotated[str, Option("host:port (port 0 picks a free one) or unix:path")] = DEFAULT_ADDRESS
    max_pinned_adapters_per_tenant: Annotated[
        int,
        Option(
            "adapters that one tenant may pin; all tenants together may pin half of the host adapters",
            Range(1, 1_000_000),
        ),
    ] = 8
    share_prefix_cache: Annotated[
        bool,
        Option(
            "let tenants reuse each other's cached prompts: faster where many send the same beginning; how long an "
            "answer takes, and usage.cached_tokens, then show one tenant what others have sent"
        ),
    ] = False
    max_lora_rank: Annotated[
        int, Option("widest inner dimension that an uploaded adapter may have", Range(1, 1 << 16))
    ] = 256
    max_virtual_tokens: Annotated[
        int, Option("most virtual tokens that an uploaded adapter may have", Range(1, 1 << 20))
    ] = 512
    max_adapter_bytes: Annotated[int, Option("largest upload in bytes, all files together", Range(1, 1 << 44))] = (
        2048 * MIB
    )
    max_concurrent_uploads: Annotated[
        int, Option("uploads at once; further ones are refused until one ends", Range(1, 1024))
    ] = 8
    max_pending_requests: Annotated[
        int,
        Option(
            "generations at once, waiting ones included; further ones are refused. The last quarter is for tenants "
            "that have none",
            Range(1, 1_000_000),
        ),
    ] = 1024
    upload_idle_seconds: Annotated[
        float, Option("how long an upload may send nothing until it is given up", Range(0.1, 3600.0))
    ] = 60.0
    upload_min_bytes_per_second: Annotated[
        int,
        Option(
            "least mean rate of an upload, after its first --upload-idle-seconds; a slower one is given up",
            Range(1, 1 << 34),
        ),
    ] = 256 << 10
    plugin_timeout_seconds: Annotated[
        float,
        Option(
            "how long a plugin may take to be imported, and to compile one upload; then its process is ended, and the "
            "upload refused",
            Range(0.1, 86400.0),
        ),
    ] = 60.0
    recompile: Annotated[
        bool, Option("compile stored adapters anew whose program is damaged or for another base, when they are used")
    ] = False
    on_engine_death: Annotated[
        str,
        Option(
            "restart the engine, after growing pauses, or drain and exit with status 1, for a supervisor to start the "
            "server again",
            choices=("restart", "exit"),
        ),
    ] = "restart"
    engine_restarts: Annotated[
        int, Option("restarts of the engine within ten minutes at most; one death more ends the server", Range(0, 1000))
    ] = 10
    engine_restart_seconds: Annotated[
        float,
        Option(
            "pause before the first restart of the engine; doubles with each that follows soon, up to a minute",
            Range(0.0, 3600.0),
        ),
    ] = 1.0
    engine_silence_seconds: Annotated[
        float,
        Option(
            "how long the engine may give no answer until it counts as hanging, and is ended; it answers between two "
            "steps. Health reports it after 30 seconds",
            Range(31.0, 86400.0),
        ),
    ] = 120.0
    drain_seconds: Annotated[
        float, Option("how long requests under way may go on after SIGTERM or SIGINT", Range(0.0, 86400.0))
    ] = 30.0
    auth: Annotated[
        str,
        Option("whether calls need an API key; with none, every caller is an administrator", choices=("none", "keys")),
    ] = "none"
    admin_key_file: Annotated[
        Path | None, Option("the administrator's key; written where missing", unset="admin.key in the store")
    ] = None
    tls_cert: Annotated[Path | None, Option("PEM file of the certificate; needs --tls-key")] = None
    tls_key: Annotated[Path | None, Option("PEM file of its key; needs --tls-cert")] = None
    insecure: Annotated[bool, Option("listen beyond loopback even without keys or TLS")] = False
    warm_grammars: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise invalid_option("model", "is empty: give a directory or a Hugging Face id")
        if not self.listen.startswith("unix:"):
            split_address(self.listen)
        elif self.listen == "unix:":
            raise invalid_option("listen", "names no path after unix:")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise invalid_option("tls_cert", "and tls_key go together: give both, or none")

    def engine_options(self) -> EngineOptions:
        return EngineOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)})


_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})")


def split_address(listen: str) -> tuple[str, int]:
    """Returns host and port of ``host:port``; an IPv6 host is in brackets."""
    found = _ADDRESS.fullmatch(listen)
    if found is None or int(found[3]) > 65535:
        raise InvalidConfigError(
            f"{listen!r} is not an address to listen on: give host:port such as 127.0.0.1:8470 or [::1]:8470, or "
            "unix:path",
            metadata={"field": "listen"},
        )
    return found[1] or found[2], int(found[3])
