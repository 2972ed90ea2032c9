"""Checkpoints of a run: directories ``checkpoint-STEP``, each with a manifest of its files.

A checkpoint is written to a staging directory and renamed. The manifest holds size and SHA-256 of every file. Kept are
the newest `SAVE_TOTAL_LIMIT`, and the best of the evaluated ones.
"""

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
from deltamux_trainers.training import distributed

SAVE_TOTAL_LIMIT = 2
MANIFEST_FILE = "manifest.json"
RUN_FILE = "run.json"
STAGING_DIR = ".writing"

_log = logging.getLogger(__name__)


def checkpoint_dir(root: Path, step: int) -> Path:
    return root / f"checkpoint-{step}"


def commit(staging: Path, final: Path) -> None:
    """Writes the manifest of a staging directory, synchronises its files to the disk, and renames it."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(staging)): _summary(path) for path in files}
    (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*files, staging / MANIFEST_FILE, staging):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    sync(final.parent)


def latest_checkpoint(root: Path) -> Path:
    """Returns the newest intact checkpoint; logs a warning for each newer one that is damaged.

    Raises:
        FailedPreconditionError: there is none.
    """
    problems: list[str] = []
    for path in _newest_first(root):
        problem = find_damage(path)
        if problem is None:
            if problems and distributed.is_main_process():
                _log.warning("%s: resuming from %s, the one before", "; ".join(problems), path.name)
            return path
        problems.append(f"{path.name} is damaged ({problem})")
    if problems:
        raise FailedPreconditionError(
            f"no checkpoint in {root} is whole: {'; '.join(problems)}. Remove the directory to begin anew",
            reason="CHECKPOINT_DAMAGED",
        )
    raise FailedPreconditionError(f"{root.parent} has no checkpoint to resume from", reason="NO_CHECKPOINT")


def find_damage(checkpoint: Path) -> str | None:
    """Returns the damage of a checkpoint's files; None where they are as they were written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        if RUN_FILE not in manifest:
            return f"{MANIFEST_FILE} is not of a run"
        for name, summary in manifest.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _summary(checkpoint / name) != summary:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return f"{MANIFEST_FILE} is missing or damaged"
    return None


def rotate_checkpoints(root: Path, best: int | None) -> None:
    """Removes all checkpoints but the newest ones and the best, given by its step."""
    kept = {path.name for path in _newest_first(root)[:SAVE_TOTAL_LIMIT]} | {f"checkpoint-{best}"}
    for path in _newest_first(root):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(root: Path) -> None:
    """Removes all checkpoints and, if it is empty then, their directory."""
    for path in (root / STAGING_DIR, *_newest_first(root)):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # not empty
        root.rmdir()


def check_same_run(saved: Mapping[str, Any], given: Mapping[str, Any], changeable: str) -> None:
    """Raises FailedPreconditionError where the settings of a resumed run differ from those of its checkpoint.

    Args:
        saved: the checkpoint's settings, by name, as JSON values; given: the run's.
        changeable: options that may differ, in words.
    """
    differing = sorted(name for name in saved.keys() | given.keys() if saved.get(name) != given.get(name))
    if differing:
        rows = [f"  {name}: saved {saved.get(name)!r}, given {given.get(name)!r}" for name in differing]
        raise FailedPreconditionError(
            "a run resumes with the settings that it began with, but these differ:\n"
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
    """Synchronises a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
