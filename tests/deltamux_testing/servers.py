"""Options and engines of the servers that tests run in their own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltamux.server.options import ServeOptions
from deltamux_testing.reference_engine import ReferenceEngine


def options(tiny_base: Path, store: Path, **given: Any) -> ServeOptions:
    return ServeOptions(model=str(tiny_base), store=store, listen="127.0.0.1:0", drain_seconds=5.0, **given)


def engine_for(tiny_base: Path, step_seconds: float = 0.0) -> ReferenceEngine:
    return ReferenceEngine(tiny_base, step_seconds=step_seconds)
