"""Writes a directory whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from deltamux.errors import FailedPreconditionError

FULL = "the disk is full, or a limit on the size of files is reached"
TORCH_CANNOT_WRITE = {"PytorchStreamWriter": FULL, "unexpected pos": FULL, "Parent directory": "its directory is gone"}
"""What torch.save says, in errors that have no class of their own, and what that means."""


def check_output(output: Path, sources: Sequence[Path] = (), *, overwrite: bool = False) -> None:
    """Checks the place of a new directory, before any work.

    Args:
        sources: directories that are read, and that the output must not replace.
    Raises:
        FailedPreconditionError: it is a file, is or holds a source, or holds files while `overwrite` is not set; where
            that is set, files of something else than a model.
    """
    if output.exists() and not output.is_dir():
        raise FailedPreconditionError(f"{output} is a file: choose another output", reason="OUTPUT_EXISTS")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FailedPreconditionError(
            f"{output} is not empty: choose another output, or allow it to be overwritten", reason="OUTPUT_EXISTS"
        )
    for source in sources:
        if source.exists() and source.resolve().is_relative_to(output.resolve()):
            raise FailedPreconditionError(
                f"{output} holds {source}, which is read: choose another output", reason="OUTPUT_EXISTS"
            )
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise FailedPreconditionError(
            f"{output} holds files, but no config.json: it is not a model's directory, and is not overwritten. Choose "
            "another output",
            reason="OUTPUT_EXISTS",
        )


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes a directory, and keeps other runs from writing into it for the length of a block; an empty one goes again.

    Raises:
        FailedPreconditionError: OUTPUT_BUSY, another process holds it; OUTPUT_NOT_WRITABLE, it cannot be made.
    """
    with told(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FailedPreconditionError(
            f"another run writes to {directory}: wait until it has ended, or choose another output",
            reason="OUTPUT_BUSY",
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something
            directory.rmdir()
        os.close(descriptor)


@contextmanager
def told(what: Path) -> Iterator[None]:
    """Turns what libraries raise when a file cannot be written (a full disk, no permission) into one error.

    Raises:
        FailedPreconditionError: OUTPUT_NOT_WRITABLE.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _not_writable(what, error) from error
    except RuntimeError as error:
        meant = next((meant for words, meant in TORCH_CANNOT_WRITE.items() if words in str(error)), None)
        if meant is None:
            raise
        raise _not_writable(what, meant) from error


def _not_writable(what: Path, error: Exception | str) -> FailedPreconditionError:
    problem = str(error).strip().partition("\n")[0]
    return FailedPreconditionError(f"{what} cannot be written: {problem}", reason="OUTPUT_NOT_WRITABLE")


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Yields an empty directory beside the output; it becomes the output when the block ends well, and else goes.

    Raises:
        FailedPreconditionError: it cannot be written.
    """
    whole = Path(os.path.realpath(output))  # what a link leads to is replaced, not the link
    staging = whole.with_name(f".{whole.name}.writing")
    try:
        with told(output):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            yield staging
            if whole.exists():
                shutil.rmtree(whole)
            staging.rename(whole)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
