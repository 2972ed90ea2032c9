"""What an adapter's name means at the moment."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from deltamux.store.records import VersionRecord


class Route(NamedTuple):
    """The version that serves, and the canary that gets `percent` of the requests."""

    serving: VersionRecord
    canary: VersionRecord | None
    percent: int

    def choose(self, request_key: str) -> VersionRecord:
        """Returns the version for a request; the same key chooses alike."""
        if self.canary is not None and _percentile(request_key) < self.percent:
            return self.canary
        return self.serving


def _percentile(request_key: str) -> int:
    return int.from_bytes(hashlib.sha256(request_key.encode()).digest()[:8], "big") % 100
