"""What PEFT's files have in common, whatever the method."""

from __future__ import annotations

import re

PREFIX = "base_model.model."
"""Stands before every module's path in PEFT's tensor names."""

BOOKKEEPING = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
    }
)
"""Keys of every adapter_config.json that change nothing that is served."""

CAUSAL_LM = {"task_type": "CAUSAL_LM", "inference_mode": True}
"""What an adapter_config.json must say so that PEFT attaches it to a causal model."""


def matches(names: tuple[str, ...] | str, path: str) -> bool:
    """Tells whether a module is meant: by names or their endings, or by a regular expression over whole paths."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def as_tuple(value: list[str] | tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
    """Returns a list of names as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value
