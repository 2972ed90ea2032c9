"""Which calls are sent again, how often, and after what pause. Both clients follow this."""

from __future__ import annotations

import random
import time
from typing import Any

from deltamux.client.calls import Call
from deltamux.client.channel import TLS_FAILED
from deltamux.errors import DeltamuxError

RETRIES = 4
"""Attempts after the first, unless the client is told another number."""

FIRST_PAUSE = 0.2
"""Seconds before the second attempt of a call that did not reach the server; they double."""

MAX_PAUSE = 60.0
"""All pauses of one call together; a call that would pause longer ends with its error."""

SPREAD = 0.25
"""A pause is longer by up to this share, at random: those who were refused together come back apart."""


class Attempts:
    """The attempts of one call.

    An error whose status carries RetryInfo is worth another attempt, after the time it says, where the call is
    repeatable; UNAVAILABLE without RetryInfo where the call is idempotent. No attempt begins beyond the deadline.

    Args:
        timeout: seconds for all attempts and pauses together; None for no deadline.
    """

    def __init__(self, call: Call[Any], retries: int, timeout: float | None) -> None:
        self._call = call
        self._left = retries
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._paused = 0.0
        self._first = True
        self._unreached = FIRST_PAUSE

    def request(self) -> Any:
        """Returns what to send in the next attempt: of an upload, its messages from the beginning."""
        first, self._first = self._first, False
        return self._call.request if first or self._call.again is None else self._call.again()

    def timeout(self) -> float | None:
        """Returns the seconds that the next attempt may take."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.001)

    def pause(self, error: DeltamuxError) -> float | None:
        """Returns the seconds to let pass before the next attempt; None if the error is final."""
        pause = self._wanted(error)
        if pause is None or self._left < 1:
            return None
        pause *= 1 + random.uniform(0, SPREAD)
        late = self._deadline is not None and time.monotonic() + pause >= self._deadline
        if late or self._paused + pause > MAX_PAUSE:
            return None
        self._left -= 1
        self._paused += pause
        return pause

    def _wanted(self, error: DeltamuxError) -> float | None:
        if error.retry_after is not None:
            return error.retry_after if self._call.repeatable else None
        if error.status != "UNAVAILABLE" or error.reason == TLS_FAILED or not self._call.idempotent:
            return None
        self._unreached *= 2
        return self._unreached / 2
