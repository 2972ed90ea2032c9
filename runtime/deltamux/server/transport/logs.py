"""Bounds what one line of the server's log may hold, whatever a caller sent."""

from __future__ import annotations

import logging

MAX_LINE = 2000
MAX_TRACEBACK = 16_000


def bound_lines(logger: logging.Logger) -> None:
    """Has a logger cut its messages to `MAX_LINE` characters and its tracebacks to `MAX_TRACEBACK`, line breaks
    within a message escaped; calling it again changes nothing."""
    if not any(isinstance(present, _Bounded) for present in logger.filters):
        logger.addFilter(_Bounded())


class _Bounded(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        record.msg, record.args = clipped(text[: MAX_LINE + 1].replace("\n", "\\n"), MAX_LINE), None
        if record.exc_info:
            # Formatters use the text where it is there already.
            record.exc_text = clipped(_FORMATTER.formatException(record.exc_info), MAX_TRACEBACK)
        return True


def clipped(text: str, limit: int) -> str:
    """Returns a text of at most so many characters: of a longer one the beginning and the end."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


_FORMATTER = logging.Formatter()
