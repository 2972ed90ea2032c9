"""Uploads into a store whose files say what they are, and looks at its objects."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from deltamux.store import AdapterKey, AdapterStore, CompiledAdapter, VersionRecord, content_digest

KEY = AdapterKey("acme", "tickets")


def opened(root: Path) -> closing[AdapterStore]:
    """Opens a store for the length of a block."""
    return closing(AdapterStore.open(root))


def execute(root: Path, script: str) -> None:
    """Changes a store's database behind its back."""
    with closing(sqlite3.connect(root / "db.sqlite3", timeout=10)) as connection:
        connection.executescript(f"PRAGMA foreign_keys = OFF; {script}")


def upload(
    store: AdapterStore, content: str, key: AdapterKey = KEY, *, promote: bool | None = None, base: str = ""
) -> VersionRecord:
    """Commits an upload whose files hold `content`, with a program that holds it too."""
    with store.staging() as staged:
        return store.commit(staged, key, staged_upload(staged, content, base), promote=promote)


def staged_upload(staged: Path, content: str, base: str = "") -> CompiledAdapter:
    (staged / "adapter_config.json").write_text(content)
    (staged / "adapter_model.safetensors").write_text(content)
    (staged / "program.safetensors").write_text(f"compiled {content}{f' for {base}' if base else ''}")
    return CompiledAdapter(content_digest(staged), "lora", 8, 0, len(content), base)


def digest_of(content: str) -> str:
    """Returns the digest of an upload whose files hold `content`."""
    file_sum = hashlib.sha256(content.encode()).hexdigest()
    names = ("adapter_config.json", "adapter_model.safetensors")
    return hashlib.sha256("".join(f"{name}\0{file_sum}\n" for name in names).encode()).hexdigest()


def objects(root: Path) -> set[str]:
    return {directory.name for directory in (root / "objects").glob("*/*")}


def copy_of(root: Path, target: Path) -> Path:
    """Copies a store as it lies on the disk, as a kill -9 would leave it."""
    shutil.copytree(root, target)
    return target
