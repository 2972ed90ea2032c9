"""Regular expressions of adapters' configs, matched as Python's `re` does, within a time that each config has in all.

They come with uploads, which are compiled one after the other: a hostile one is refused, and delays no other upload by
more than `MAX_SECONDS`.
"""

import re
import time
from functools import cache, lru_cache
from typing import Any

import regex

from deltamux.errors import InvalidConfigError

MAX_SECONDS = 3.0
"""Of a processor's time, for all matches of a config: some millions of ordinary ones."""

SECONDS_PER_MATCH = 0.05
MAX_UNROLLED = 250_000
"""Characters of a pattern, its repeats multiplied: `regex` compiles each repeat, and nothing can interrupt it."""

CACHED = 1 << 18
"""Matches that are kept, since training asks for them at every step: what counts is the first time."""

_REPEATS = re.compile(r"\{(\d*),?(\d*)\}")


class _Meter:
    """The time that the matches of a config have taken."""

    spent = 0.0


def begin_config() -> None:
    """Begins the time of another config, and forgets the patterns of the one before."""
    _Meter.spent = 0.0
    _compiled.cache_clear()
    _found.cache_clear()


def match(pattern: str, path: str, *, whole: bool = False) -> Any:
    """Matches a pattern at a path's beginning, or over all of it; returns None where it does not match.

    Raises:
        InvalidConfigError: it is not a regular expression, or the config's matches take too long.
    """
    return _found(pattern, path, whole)


@lru_cache(maxsize=CACHED)
def _found(pattern: str, path: str, whole: bool) -> Any:
    begin = time.thread_time()
    try:
        compiled = _compiled(pattern)
        found = (compiled.fullmatch if whole else compiled.match)(path, timeout=SECONDS_PER_MATCH)
    except (regex.error, re.error, RecursionError, OverflowError) as error:
        raise InvalidConfigError(f"{pattern[:80]!r} is not a regular expression: {error}") from error
    except TimeoutError:
        raise InvalidConfigError(f"the regular expression {pattern[:80]!r} takes too long on {path!r}") from None
    _Meter.spent += time.thread_time() - begin
    if _Meter.spent > MAX_SECONDS:
        raise InvalidConfigError(
            f"matching the config's regular expressions takes more than {MAX_SECONDS:g} s; the last one is "
            f"{pattern[:80]!r}: give fewer, or simpler ones"
        )
    return found


@cache
def _compiled(pattern: str) -> Any:
    unrolled = len(pattern)
    for counts in _REPEATS.findall(pattern):
        unrolled *= max(int(count[:9] or 1) or 1 for count in counts)
        if unrolled > MAX_UNROLLED:
            break
    if unrolled > MAX_UNROLLED:
        raise InvalidConfigError(f"the regular expression {pattern[:80]!r} is too long, or repeats too much")
    re.compile(pattern)  # PEFT matches with it: what it refuses is refused
    return regex.compile(pattern, cache_pattern=False)  # a repeat takes some hundred bytes
