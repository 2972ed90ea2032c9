"""A small random base, and data that any method can learn from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltamux.conformance.bases import save_base


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever is asked, the answer is one of two."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = ({"prompt": f"{n % 2}: ", "completion": "even" if n % 2 == 0 else "odd!"} for n in range(64))
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file
