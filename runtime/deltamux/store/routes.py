"""Routes: the versions that an adapter's name is routed to."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple, Self

from deltamux.errors import DataLossError, FailedPreconditionError
from deltamux.store.records import AdapterRecord, VersionKey, VersionRecord


class Route(NamedTuple):
    """The serving version, and the canary with `percent` of the requests."""

    serving: VersionRecord
    canary: VersionRecord | None
    percent: int

    @classmethod
    def of(cls, adapter: AdapterRecord, find: Callable[[int], VersionRecord | None]) -> Self:
        """Returns an adapter's route; raises DataLossError if no version serves (ROW_DAMAGED).

        Args:
            find: returns the adapter's version of a number; None if there is none.
        """
        serving, canary = find(adapter.serving), adapter.canary
        if serving is None:
            raise _no_serving_version(adapter)
        candidate = find(canary.number) if canary else None
        return cls(serving, candidate, canary.percent if canary and candidate else 0)

    def choose(self, request_key: str) -> VersionRecord:
        """Returns the version for a request; the same key always gets the same one."""
        if self.canary is not None and _percentile(request_key) < self.percent:
            return self.canary
        return self.serving


def _no_serving_version(adapter: AdapterRecord) -> DataLossError:
    """Returns the error of an adapter without a serving version, as its rows are damaged."""
    which = f"version {adapter.serving}, which serves, is not in the store" if adapter.serving else "no version serves"
    return DataLossError(
        f"the rows of {adapter.key} are damaged: {which}. Promote a version, or repair the store with "
        "`deltamux store check --repair`",
        reason="ROW_DAMAGED",
        metadata={"name": str(adapter.key)},
    )


def _percentile(request_key: str) -> int:
    return int.from_bytes(hashlib.sha256(request_key.encode()).digest()[:8], "big") % 100


def check_canary(adapter: AdapterRecord, number: int) -> None:
    """Raises FailedPreconditionError, reason ALREADY_SERVING, for the serving version."""
    if number == adapter.serving:
        raise FailedPreconditionError(
            f"version {number} of {adapter.key} serves already: a canary must be another version",
            reason="ALREADY_SERVING",
            metadata={"name": str(VersionKey(*adapter.key, number))},
        )
