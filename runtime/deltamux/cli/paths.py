"""Paths on the command line."""

import argparse
from pathlib import Path


def path(text: str) -> Path:
    """Returns a path; an empty one, which `Path` takes for this directory, and one too long for any file are refused.

    Raises:
        argparse.ArgumentTypeError: with what is wrong.
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a path (this directory is '.')")
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be a path: {error.strerror}") from None
    return Path(text)
