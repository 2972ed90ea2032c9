"""Writes a directory whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from deltamux.errors import FailedPreconditionError


def check_output(output: Path, sources: Sequence[Path] = (), *, overwrite: bool = False) -> None:
    """Checks the place of a new directory, before any work.

    Args:
        sources: directories that are read, and that the output must not replace.
    Raises:
        FailedPreconditionError: it is a file, holds files while `overwrite` is not set, or is or holds a source.
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


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Yields an empty directory beside the output; it becomes the output when the block ends well, and else goes.

    Raises:
        FailedPreconditionError: it cannot be written.
    """
    whole = Path(os.path.abspath(output))
    staging = whole.with_name(f".{whole.name}.writing")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        if whole.exists():
            shutil.rmtree(whole)
        staging.rename(whole)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise FailedPreconditionError(f"{output} cannot be written: {error}", reason="OUTPUT_NOT_WRITABLE") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
