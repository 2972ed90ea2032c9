"""Checkpoints on disk: whole or not there, found damaged by their manifest, and bound to the run that wrote them.

A checkpoint is a directory ``checkpoint-STEP``. Its files are written beside it and renamed in; its manifest holds the
size and SHA-256 of each. The newest `KEPT` stay, and the best of those that were evaluated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltamux.errors import FailedPreconditionError
from deltamux_trainers.training import ranks

KEPT = 2
MANIFEST_FILE = "manifest.json"
RUN_FILE = "run.json"
STAGING = ".writing"

_log = logging.getLogger(__name__)


def directory(root: Path, step: int) -> Path:
    return root / f"checkpoint-{step}"


def seal(staging: Path, final: Path) -> None:
    """Gives a directory its manifest, brings it to the disk, and puts it in its place."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(staging)): _summary(path) for path in files}
    (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*files, staging / MANIFEST_FILE, staging):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    sync(final.parent)


def newest_whole(root: Path) -> Path:
    """Returns the newest checkpoint that is whole, and logs a warning for each newer one that is not.

    Raises:
        FailedPreconditionError: there is none.
    """
    problems: list[str] = []
    for path in _newest_first(root):
        problem = damage(path)
        if problem is None:
            if problems and ranks.is_first():
                _log.warning("%s: going on from %s, the one before", "; ".join(problems), path.name)
            return path
        problems.append(f"{path.name} is damaged ({problem})")
    if problems:
        raise FailedPreconditionError(
            f"no checkpoint in {root} is whole: {'; '.join(problems)}. Remove the directory to begin anew",
            reason="CHECKPOINT_DAMAGED",
        )
    raise FailedPreconditionError(f"{root.parent} has no checkpoint to resume from", reason="NO_CHECKPOINT")


def damage(checkpoint: Path) -> str | None:
    """Tells what is wrong with a checkpoint's files; None where they are as they were written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        for name, summary in manifest.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _summary(checkpoint / name) != summary:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError):
        return f"{MANIFEST_FILE} is missing or damaged"
    return None


def remove_old(root: Path, best: int | None) -> None:
    """Removes all checkpoints but the newest and the best, given by its step."""
    kept = {path.name for path in _newest_first(root)[:KEPT]} | {f"checkpoint-{best}"}
    for path in _newest_first(root):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def remove_all(root: Path) -> None:
    """Removes all checkpoints and, where nothing else is left in it, the directory that they are in."""
    for path in (root / STAGING, *_newest_first(root)):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it holds other files
        root.rmdir()


def check_same_run(saved: Mapping[str, Any], given: Mapping[str, Any], changeable: str) -> None:
    """Raises FailedPreconditionError where a run would go on with other options than it began with.

    Args:
        saved, given: what determines a run, by name, as JSON values.
        changeable: what may differ, in words.
    """
    differing = sorted(name for name in saved.keys() | given.keys() if saved.get(name) != given.get(name))
    if differing:
        rows = [f"  {name}: saved {saved.get(name)!r}, given {given.get(name)!r}" for name in differing]
        raise FailedPreconditionError(
            "a run goes on with what it began with, but these differ:\n"
            + "\n".join(rows)
            + f"\nGive what was saved, or choose another output. Only {changeable} may change",
            reason="RESUME_MISMATCH",
            metadata={"field": differing[0]},
        )


def _newest_first(root: Path) -> list[Path]:
    return [path for _, path in sorted(_numbered(root), reverse=True)]


def _numbered(root: Path) -> Iterator[tuple[int, Path]]:
    for path in root.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir():
            yield int(step), path


def _summary(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def sync(path: Path) -> None:
    """Brings a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
