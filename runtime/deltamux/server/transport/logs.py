"""A bound on the length of log lines, which may quote a caller's text."""

import logging

MAX_LINE = 2000
MAX_TRACEBACK = 16_000


def limit_line_length(logger: logging.Logger) -> None:
    """Truncates a logger's messages to `MAX_LINE` characters and its tracebacks to `MAX_TRACEBACK`, and escapes line
    breaks within a message; a second call changes nothing."""
    if not any(isinstance(present, _LineLengthLimit) for present in logger.filters):
        logger.addFilter(_LineLengthLimit())


class _LineLengthLimit(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        record.msg, record.args = truncate(text[: MAX_LINE + 1].replace("\n", "\\n"), MAX_LINE), None
        if record.exc_info:
            # Formatters use this text if it is set.
            record.exc_text = truncate(_FORMATTER.formatException(record.exc_info), MAX_TRACEBACK)
        return True


def truncate(text: str, limit: int) -> str:
    """Returns a text, or the beginning and end of one that is longer than the limit."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


_FORMATTER = logging.Formatter()
