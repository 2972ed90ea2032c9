"""A small random base, and data that any method can learn from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def directory(base_directory: Path) -> Path:
    return base_directory


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever is asked, the answer is one of two."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = ({"prompt": f"{n % 2}: ", "completion": "even" if n % 2 == 0 else "odd!"} for n in range(64))
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file
