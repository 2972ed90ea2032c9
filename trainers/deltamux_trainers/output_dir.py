"""Output directories: checks before any work, a lock, and writing that is atomic."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from deltamux.errors import FailedPreconditionError

DISK_FULL = "the disk is full, or a limit on the size of files is reached"
TORCH_WRITE_ERRORS = {
    "PytorchStreamWriter": DISK_FULL,
    "unexpected pos": DISK_FULL,
    "Parent directory": "its directory is gone",
}
"""Causes of torch.save's errors, which have no class of their own, by a part of the message."""


def check_output(output: Path, sources: Sequence[Path] = (), *, overwrite: bool = False) -> None:
    """Checks a directory that is to be written, before any work.

    Args:
        sources: directories that are read, and that the output must not replace.
    Raises:
        FailedPreconditionError: OUTPUT_EXISTS; it is a file, is or holds a source, or holds files while `overwrite` is
            not set; where that is set, files other than a model's.
    """
    is_filled = output.is_dir() and any(output.iterdir())
    if output.exists() and not output.is_dir():
        raise output_exists(f"{output} is a file: choose another output")
    if is_filled and not overwrite:
        raise output_exists(f"{output} is not empty: choose another output, or allow it to be overwritten")
    for source in sources:
        if source.exists() and source.resolve().is_relative_to(output.resolve()):
            raise output_exists(f"{output} holds {source}, which is read: choose another output")
    if is_filled and not (output / "config.json").is_file():
        raise output_exists(
            f"{output} holds files, but no config.json: it is not a model's directory, and is not overwritten. Choose "
            "another output"
        )


def output_exists(problem: str) -> FailedPreconditionError:
    """Returns the error OUTPUT_EXISTS."""
    return FailedPreconditionError(problem, reason="OUTPUT_EXISTS")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes a directory and locks it for other runs during a block; it is removed at the end if it is empty.

    Raises:
        FailedPreconditionError: OUTPUT_BUSY, another process has the lock; OUTPUT_NOT_WRITABLE, it cannot be made.
    """
    with write_errors(directory):
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
        with suppress(OSError):  # not empty
            directory.rmdir()
        os.close(descriptor)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns the libraries' errors of writing a file (a full disk, no permission) into one error.

    Raises:
        FailedPreconditionError: OUTPUT_NOT_WRITABLE.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _not_writable(path, error) from error
    except RuntimeError as error:
        cause = next((cause for words, cause in TORCH_WRITE_ERRORS.items() if words in str(error)), None)
        if cause is None:
            raise
        raise _not_writable(path, cause) from error


def _not_writable(path: Path, cause: Exception | str) -> FailedPreconditionError:
    problem = str(cause).strip().partition("\n")[0]
    return FailedPreconditionError(f"{path} cannot be written: {problem}", reason="OUTPUT_NOT_WRITABLE")


@contextmanager
def atomic_output(output: Path) -> Iterator[Path]:
    """Yields an empty staging directory next to the output; it replaces the output, or is removed after an error.

    Raises:
        FailedPreconditionError: it cannot be written.
    """
    target = Path(os.path.realpath(output))  # the target of a link is replaced, not the link
    staging = target.with_name(f".{target.name}.writing")
    try:
        with write_errors(output):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            yield staging
            if target.exists():
                shutil.rmtree(target)
            staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
