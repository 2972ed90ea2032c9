"""Checks of an engine's options that need no import of vLLM, which takes long."""

import ast
import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from deltamux.engine.base import EngineOptions
from deltamux.errors import InvalidConfigError

OWN = ("enable_lora", "max_loras", "model", "scheduler_cls", "worker_cls")
"""Arguments of AsyncEngineArgs that deltamux sets itself, without which it does not work."""

LENGTH_KEYS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_len", "seq_length", "max_seq_length"),
    *("max_sequence_length", "max_target_positions", "model_max_length"),
)
"""Keys of a base's config, any of which may be the longest context."""

MAX_SENTENCE = 1000
"""Characters of an error of vLLM's in a message."""


def check_options(options: EngineOptions) -> None:
    """Raises InvalidConfigError for arguments that vLLM does not have, a cache or a context that cannot be."""
    _check_arguments(options.engine_arguments)
    memory = psutil.virtual_memory().total / 2**30
    if options.device != "cuda" and options.kv_cache_gib > memory:
        raise InvalidConfigError(
            f"option kv_cache_gib is {options.kv_cache_gib:g}; this machine has {memory:.1f} GiB in all: give less",
            metadata={"field": "kv_cache_gib"},
        )
    if options.max_model_len is not None and not os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0").strip("0"):
        longest = longest_context(options.model)
        if longest is not None and options.max_model_len > longest:
            raise InvalidConfigError(
                f"option max_model_len is {options.max_model_len}; the base model {options.model} has a context of "
                f"{longest} tokens: give at most as many",
                metadata={"field": "max_model_len", "limit": str(longest)},
            )


def _check_arguments(given: Mapping[str, Any]) -> None:
    known = argument_names() if given else frozenset()
    for name in given:
        if name in OWN:
            raise _invalid(name, "is what deltamux sets itself: leave it out")
        if known and name not in known:
            raise _invalid(name, "is not an argument of the installed vLLM's AsyncEngineArgs")
    if not isinstance(given.get("additional_config", {}), Mapping):
        raise _invalid("additional_config", "must be a JSON object")


def in_a_sentence(error: BaseException) -> str:
    """Returns the message of an error of vLLM's on one line; pydantic's quote the whole config, in many."""
    problems = getattr(error, "errors", None)
    if callable(problems):
        named = ((".".join(map(str, problem["loc"])), problem["msg"]) for problem in problems())
        text = "; ".join(f"{where}: {what}" if where else what for where, what in named)
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.removeprefix("Value error, ").split())[:MAX_SENTENCE]


def argument_names() -> frozenset[str]:
    """Returns the names of AsyncEngineArgs' fields, read from its source; empty where that is not found."""
    found = find_spec("vllm")
    for directory in (found.submodule_search_locations or ()) if found else ():
        file = Path(directory, "engine", "arg_utils.py")
        if file.is_file():
            return frozenset(_fields(ast.parse(file.read_bytes())))
    return frozenset()


def _fields(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs"):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield statement.target.id


def longest_context(model: str) -> int | None:
    """Returns how long the context of a base in a directory is at most; None where only vLLM has it.

    vLLM takes the least of the config's keys, times a factor of RoPE's: this is never less.
    """
    try:
        config = json.loads(Path(model, "config.json").read_bytes())
    except (OSError, ValueError):  # no directory, or one that the engine refuses
        return None
    parts = [part for part in (config, *_objects(config)) if isinstance(part, dict)]
    lengths = [part[key] for part in parts for key in LENGTH_KEYS if type(part.get(key)) is int]
    factors = [1.0, *(part["factor"] for part in parts if isinstance(part.get("factor"), (int, float)))]
    return int(max(lengths) * max(factors)) if lengths else None


def _objects(value: Any) -> Iterator[Any]:
    """Yields the objects within an object: the text model's part, RoPE's parameters, one layer type's of those."""
    if isinstance(value, dict):
        for child in value.values():
            if isinstance(child, dict):
                yield child
                yield from _objects(child)


def _invalid(name: str, problem: str) -> InvalidConfigError:
    return InvalidConfigError(
        f"option engine_arg: {name[:80]!r} {problem}", metadata={"field": "engine_arg", "argument": name[:80]}
    )
