"""A client's record of its adapters: every acknowledged change, and the one whose answer never came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deltamux.client import Client
from deltamux.client.results import Adapter, AdapterVersion
from deltamux.errors import NotFoundError


class ViolationError(AssertionError):
    """The server contradicts what it has acknowledged."""


@dataclass(frozen=True)
class State:
    """An adapter as it is after a number of changes.

    Attributes:
        versions: digest by number.
        promoted: the version that serves, last, and those that served before.
        last_number: of any version so far: no number comes back.
    """

    versions: Mapping[int, str] = field(default_factory=dict)
    promoted: tuple[int, ...] = ()
    pinned: bool = False
    last_number: int = 0

    def uploaded(self, digest: str, promote: bool) -> State:
        known = next((number for number, other in self.versions.items() if other == digest), None)
        number = known or self.last_number + 1
        state = replace(self, versions={**self.versions, number: digest}, last_number=max(self.last_number, number))
        return state.serving(number) if promote or not self.promoted else state

    def serving(self, number: int) -> State:
        return self if self.promoted[-1:] == (number,) else replace(self, promoted=(*self.promoted, number))

    @property
    def previous(self) -> int | None:
        """The version that a rollback returns to: the last one that served and is another than the serving one."""
        return next((number for number in reversed(self.promoted) if number != self.promoted[-1]), None)

    def rolled_back(self) -> State:
        assert self.previous is not None
        last = len(self.promoted) - self.promoted[::-1].index(self.previous)
        return replace(self, promoted=self.promoted[:last])

    def without(self, number: int) -> State:
        versions = {n: digest for n, digest in self.versions.items() if n != number}
        return replace(self, versions=versions, promoted=tuple(n for n in self.promoted if n != number))

    def deleted(self) -> State:
        return State(last_number=self.last_number)

    def is_what(self, adapter: Adapter | None, versions: list[AdapterVersion]) -> bool:
        """Whether the server shows just this state."""
        if adapter is None:
            return not self.versions
        if {v.version: v.digest for v in versions} != dict(self.versions):
            return False
        shown = (adapter.serving_version, adapter.previous_version, adapter.pinned)
        return shown == (self.promoted[-1], self.previous, self.pinned)


@dataclass
class Account:
    """One adapter of one client.

    Attributes:
        state: after the last change that was acknowledged.
        doubtful: after a change that was sent and not answered: it may have been made, as a whole, or not at all.
    """

    name: str
    state: State = State()
    doubtful: State | None = None

    def look(self, client: Client) -> None:
        """Compares the account with the server's view, which settles what is doubtful.

        Raises:
            ViolationError: the server shows neither state.
        """
        adapter, versions = _shown(client, self.name)
        for state in (self.state, self.doubtful):
            if state is not None and state.is_what(adapter, versions):
                self.state, self.doubtful = state, None
                return
        numbers = {v.version: v.digest[:8] for v in versions}
        raise ViolationError(f"{self.name} is {adapter} with versions {numbers}, not {self.state} or {self.doubtful}")


def _shown(client: Client, name: str) -> tuple[Adapter | None, list[AdapterVersion]]:
    try:
        return client.get_adapter(name), client.list_adapter_versions(name)
    except NotFoundError:
        return None, []
