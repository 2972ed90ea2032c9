"""The retry policy of both clients: which calls, how often, and after what pause."""

import random
import time
from typing import Any

from deltamux.client.calls import Call
from deltamux.client.channel import TLS_FAILED
from deltamux.errors import DeltamuxError

RETRIES = 4
"""Default of the attempts after the first."""

FIRST_PAUSE = 0.2
"""Seconds before the second attempt of a call that did not reach the server; each further one doubles."""

MAX_PAUSE = 60.0
"""Longest sum of the pauses of one call; a call that would pause longer raises its error."""

SPREAD = 0.25
"""Random extension of a pause, at most this share, to spread the retries of callers refused together."""


class Attempts:
    """The attempts of one call.

    An error with RetryInfo is retried after the time in it, if the call is retryable; UNAVAILABLE without RetryInfo, if
    the call is idempotent. No attempt begins after the deadline.

    Args:
        timeout: seconds for all attempts and pauses; None for no deadline.
    """

    def __init__(self, call: Call[Any], retries: int, timeout: float | None) -> None:
        self._call = call
        self._left = retries
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._paused = 0.0
        self._first = True
        self._backoff = FIRST_PAUSE

    def request(self) -> Any:
        """Returns the request of the next attempt: for an upload, its messages from the beginning."""
        first, self._first = self._first, False
        return self._call.request if first or self._call.new_request is None else self._call.new_request()

    def timeout(self) -> float | None:
        """Returns the seconds that the next attempt may take."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.001)

    def pause(self, error: DeltamuxError) -> float | None:
        """Returns the seconds before the next attempt; None if the error is final."""
        pause = self._next_pause(error)
        if pause is None or self._left < 1:
            return None
        pause *= 1 + random.uniform(0, SPREAD)
        late = self._deadline is not None and time.monotonic() + pause >= self._deadline
        if late or self._paused + pause > MAX_PAUSE:
            return None
        self._left -= 1
        self._paused += pause
        return pause

    def _next_pause(self, error: DeltamuxError) -> float | None:
        if error.retry_after is not None:
            return error.retry_after if self._call.retryable else None
        if error.status != "UNAVAILABLE" or error.reason == TLS_FAILED or not self._call.idempotent:
            return None
        self._backoff *= 2
        return self._backoff / 2
