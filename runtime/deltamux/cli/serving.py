"""`deltamux serve`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from deltamux.errors import InvalidConfigError

HELP = {
    "model": "directory or Hugging Face id of the base model",
    "store": "directory of adapters and tenants; made where there is none",
    "listen": "host:port (port 0 picks a free one) or unix:path",
    "max_active_adapters": "adapters that one batch may mix (default: 32 on a CPU, 8 on a GPU)",
    "max_host_adapters": "compiled adapters kept ready in host memory",
    "max_pinned_adapters_per_tenant": "adapters that one tenant may pin",
    "max_model_len": "longest context in tokens (default: the model's)",
    "max_num_seqs": "most sequences in one batch",
    "dtype": "auto, float32, bfloat16 or float16",
    "device": "auto, cpu or cuda",
    "kv_cache_gib": "size of the key-value cache on a CPU, in GiB",
    "enforce_eager": "leave the model uncompiled: ready sooner, slower at every token",
    "fold_dominant": "never fold the adapter that carries most of the traffic into a second copy of the weights",
    "share_prefix_cache": "let tenants reuse each other's cached prompts, which tells one what others have sent",
    "grammar_seconds": "CPU time that compiling the grammar of a structured output may take",
    "max_lora_rank": "widest inner dimension that an uploaded adapter may have",
    "max_virtual_tokens": "most virtual tokens that an uploaded adapter may have",
    "max_adapter_bytes": "largest upload, in bytes",
    "max_concurrent_uploads": "uploads at once",
    "upload_idle_seconds": "how long an upload may send nothing",
    "upload_min_bytes_per_second": "least mean rate of an upload",
    "max_pending_requests": "generations at once, waiting ones included",
    "plugin_timeout_seconds": "how long a plugin may take to be imported, and to compile one upload",
    "recompile": "compile stored adapters anew whose program is damaged or for another base, when they are used",
    "on_engine_death": "restart (the engine) or exit (the server, with status 1)",
    "engine_restarts": "restarts of the engine within ten minutes at most; one death more ends the server",
    "engine_silence_seconds": "how long the engine may give no answer until it counts as hanging, and is ended",
    "drain_seconds": "how long requests under way may go on after SIGTERM",
    "auth": "none or keys",
    "admin_key_file": "the administrator's key (default: admin.key in the store; written where missing)",
    "tls_cert": "PEM file",
    "tls_key": "PEM file",
    "insecure": "listen beyond loopback even without keys or TLS",
}
_TYPES: dict[str, Any] = {"int": int, "int | None": int, "float": float, "Path": Path, "Path | None": Path, "str": str}


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("serve", help="start the server", description="Start the server.")
    from deltamux.server.options import RANGES, ServeOptions

    for field in dataclasses.fields(ServeOptions):
        if field.name in HELP:
            _add_option(
                parser, field, f"{allowed.low:g} to {allowed.high:.10g}" if (allowed := RANGES.get(field.name)) else ""
            )
    parser.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of vLLM's AsyncEngineArgs (the value is JSON); may be repeated",
    )
    parser.set_defaults(run=_serve)


def _add_option(parser: argparse.ArgumentParser, field: Any, allowed: str) -> None:
    flag, text = f"--{field.name.replace('_', '-')}", HELP[field.name]
    if field.type == "bool":
        # What is on by default has a flag that turns it off.
        off = bool(field.default)
        flag, action = (flag.replace("--", "--no-", 1), "store_false") if off else (flag, "store_true")
        parser.add_argument(flag, dest=field.name, action=action, help=text)
        return
    required = field.default is dataclasses.MISSING
    notes = [] if required or field.default is None else [f"default: {field.default}"]
    notes += [allowed] if allowed else []
    shown = f" ({'; '.join(notes)})" if notes else ""
    default = None if required else field.default
    parser.add_argument(flag, required=required, type=_TYPES[field.type], default=default, help=text + shown)


def _serve(arguments: argparse.Namespace) -> None:
    from deltamux.server import ServeOptions, serve

    given = {name: getattr(arguments, name) for name in HELP}
    serve(ServeOptions(**given, engine_arguments=_engine_arguments(arguments.engine_arg)))


def _engine_arguments(pairs: list[str]) -> dict[str, Any]:
    import json

    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidConfigError(f"--engine-arg {pair!r}: write KEY=VALUE", metadata={"field": "engine_arg"})
        try:
            values[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            values[key.replace("-", "_")] = value
    return values
