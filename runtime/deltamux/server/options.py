"""What a server is started with; the command line's options have these names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deltamux.engine.base import EngineOptions
from deltamux.errors import InvalidConfigError

AUTH_MODES = ("none", "keys")
DEATH_MODES = ("restart", "exit")
MIB = 1 << 20


@dataclass(frozen=True)
class ServeOptions:
    """Everything that `deltamux serve` may be told.

    Attributes:
        model: directory or Hugging Face id of the base model.
        store: directory of adapters, versions and tenants; made where it does not exist.
        listen: ``host:port`` (port 0 picks a free one) or ``unix:path``.
        max_active_adapters: adapters that one batch may mix (device slots); None: 32 on a CPU, 8 on a GPU.
        max_host_adapters: compiled adapters kept ready in host memory.
        max_pinned_adapters_per_tenant: adapters that one tenant may pin; all tenants together may pin half as many as
            there are host adapters.
        max_model_len: longest context in tokens, one of the prompt and a new one at least; None takes the model's own.
        max_num_seqs: most sequences in one batch.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu or cuda.
        kv_cache_gib: size of the key-value cache on CPU.
        enforce_eager: leave the model uncompiled: ready sooner, slower at every token.
        share_prefix_cache: let tenants reuse each other's cached prompts: faster where many tenants send the same
            beginning, and how long an answer takes, and ``usage.cached_tokens``, then tell one what others have sent.
        grammar_seconds: CPU time that compiling the grammar of a structured output may take.
        fold_dominant: fold the adapter that carries most of the traffic, where that is measured to be faster.
        engine_arguments: handed to vLLM's AsyncEngineArgs as they are.
        max_lora_rank: widest inner dimension that an uploaded adapter may have.
        max_virtual_tokens: most virtual tokens that an uploaded adapter may have.
        max_adapter_bytes: largest upload, all files together.
        max_concurrent_uploads: uploads at once; one more is told to come back.
        max_pending_requests: generations at once, waiting ones included; one more is told to come back. The last
            quarter goes to tenants that have none.
        upload_idle_seconds: an upload that sends nothing for so long is given up.
        upload_min_bytes_per_second: least mean rate of an upload, its first `upload_idle_seconds` left out; one that is
            slower is given up.
        plugin_timeout_seconds: how long a plugin may take to be imported, and to compile one upload; then its process
            is ended, and the upload refused.
        recompile: compile stored adapters anew, when they are used, whose program is damaged or for another base.
        on_engine_death: restart (another engine is started, after growing pauses) or exit (the server drains and ends
            with status 1, for something outside to start it again).
        engine_restarts: restarts within ten minutes at most; one death more ends the server as `exit` does.
        engine_restart_seconds: pause before the first restart; doubles with each that follows soon, up to a minute.
        engine_silence_seconds: how long the engine may give no answer until it counts as hanging, and is ended; it
            answers between two steps, so this is more than the longest step takes. Health tells of it after 30 seconds.
        drain_seconds: how long requests under way may go on after SIGTERM or SIGINT.
        auth: none (every caller is an administrator) or keys.
        admin_key_file: holds the administrator's key; None is ``admin.key`` in the store. Written where missing.
        tls_cert, tls_key: PEM files; both or none.
        insecure: listens beyond loopback even without keys or without TLS.
    """

    model: str
    store: Path
    listen: str = "127.0.0.1:8470"
    max_active_adapters: int | None = None
    max_host_adapters: int = 256
    max_pinned_adapters_per_tenant: int = 8
    max_model_len: int | None = None
    max_num_seqs: int = 64
    dtype: str = "auto"
    device: str = "auto"
    kv_cache_gib: float = 2.0
    engine_arguments: Mapping[str, Any] = field(default_factory=dict)
    enforce_eager: bool = False
    fold_dominant: bool = True
    share_prefix_cache: bool = False
    grammar_seconds: float = 2.0
    max_lora_rank: int = 256
    max_virtual_tokens: int = 512
    max_adapter_bytes: int = 2048 * MIB
    max_concurrent_uploads: int = 8
    max_pending_requests: int = 1024
    upload_idle_seconds: float = 60.0
    upload_min_bytes_per_second: int = 256 << 10
    plugin_timeout_seconds: float = 60.0
    recompile: bool = False
    on_engine_death: str = "restart"
    engine_restarts: int = 10
    engine_restart_seconds: float = 1.0
    engine_silence_seconds: float = 120.0
    drain_seconds: float = 30.0
    auth: str = "none"
    admin_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise _invalid(name, f"must be one of {', '.join(choices)}, not {value!r}")
        for name, allowed in RANGES.items():
            if (value := getattr(self, name)) is None and _default(name) is None:
                continue
            if not allowed.holds(value):
                raise _invalid(name, f"must be {allowed}, not {value!r}")
        if not self.model:
            raise _invalid("model", "is empty: give a directory or a Hugging Face id")
        if not self.listen.startswith("unix:"):
            split_address(self.listen)
        elif self.listen == "unix:":
            raise _invalid("listen", "names no path behind unix:")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise _invalid("tls_cert", "and tls_key go together: give both, or none")

    def engine_options(self) -> EngineOptions:
        return EngineOptions(
            model=self.model,
            dtype=self.dtype,
            device=self.device,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_active_adapters=self.max_active_adapters,
            max_host_adapters=self.max_host_adapters,
            kv_cache_gib=self.kv_cache_gib,
            enforce_eager=self.enforce_eager,
            fold_dominant=self.fold_dominant,
            grammar_seconds=self.grammar_seconds,
            warm_grammars=True,
            engine_arguments=self.engine_arguments,
        )


class Range(NamedTuple):
    """The numbers that an option takes, both ends included; whole numbers where `low` is one."""

    low: float
    high: float

    def holds(self, value: object) -> bool:
        kinds: tuple[type, ...] = (int,) if self.whole else (int, float)
        # A NaN compares as false with everything.
        return type(value) in kinds and self.low <= value <= self.high  # type: ignore[operator]  # a number by now

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int)

    def __str__(self) -> str:
        return f"{'a whole number' if self.whole else 'a number'} from {self.low:g} to {self.high:.10g}"


CHOICES: Mapping[str, tuple[str, ...]] = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "on_engine_death": DEATH_MODES,
    "auth": AUTH_MODES,
}
"""The options that take one of several words."""

RANGES: Mapping[str, Range] = {
    "max_active_adapters": Range(1, 4096),
    "max_host_adapters": Range(1, 1_000_000),
    "max_pinned_adapters_per_tenant": Range(1, 1_000_000),
    "max_model_len": Range(2, 1 << 27),
    "max_num_seqs": Range(1, 1 << 16),
    "kv_cache_gib": Range(0.01, 65536.0),
    "grammar_seconds": Range(0.05, 60.0),
    "max_lora_rank": Range(1, 1 << 16),
    "max_virtual_tokens": Range(1, 1 << 20),
    "max_adapter_bytes": Range(1, 1 << 44),
    "max_concurrent_uploads": Range(1, 1024),
    "max_pending_requests": Range(1, 1_000_000),
    "upload_idle_seconds": Range(0.1, 3600.0),
    "upload_min_bytes_per_second": Range(1, 1 << 34),
    "plugin_timeout_seconds": Range(0.1, 86400.0),
    "engine_restarts": Range(0, 1000),
    "engine_restart_seconds": Range(0.0, 3600.0),
    "engine_silence_seconds": Range(31.0, 86400.0),
    "drain_seconds": Range(0.0, 86400.0),
}
"""The options that are numbers; one whose default is None takes None as well."""


_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})")


def split_address(listen: str) -> tuple[str, int]:
    """Returns host and port of ``host:port``; an IPv6 host stands in brackets."""
    found = _ADDRESS.fullmatch(listen)
    if found is None or int(found[3]) > 65535:
        raise InvalidConfigError(
            f"{listen!r} is not an address to listen on: give host:port such as 127.0.0.1:8470 or [::1]:8470, or "
            "unix:path",
            metadata={"field": "listen"},
        )
    return found[1] or found[2], int(found[3])


def _default(name: str) -> Any:
    return ServeOptions.__dataclass_fields__[name].default


def _invalid(name: str, problem: str) -> InvalidConfigError:
    return InvalidConfigError(f"option {name} {problem}", metadata={"field": name})
