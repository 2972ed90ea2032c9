"""The storm's clients: each changes adapters of its own at random, and remembers what the server acknowledged."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from deltamux.client import Client
from deltamux.errors import DeltamuxError, UnavailableError
from storms.ledger import Account, State, ViolationError

PROMPT = (5, 17, 99, 200, 3, 3)
PAUSE = 0.3
"""Seconds between two attempts while the server is away."""


class Kind(NamedTuple):
    """An adapter's content: its directory, its digest, and what it answers to PROMPT."""

    directory: Path
    digest: str
    answer: tuple[int, ...]


def answer(client: Client, name: str | None) -> tuple[int, ...]:
    return client.generate(list(PROMPT), adapter=name, max_tokens=16, temperature=0.0, ignore_eos=True).token_ids


class StormClient(threading.Thread):
    """One tenant with three adapters.

    Args:
        go: while it is set, the client works.

    Attributes:
        busy: held while a call is under way; whoever holds it has the client to itself.
        problems: what contradicted an acknowledgement, or was no honest UNAVAILABLE.
    """

    def __init__(self, tenant: str, address: str, kinds: Mapping[str, Kind], go: threading.Event, seed: int) -> None:
        super().__init__(name=tenant, daemon=True)
        self.busy = threading.Lock()
        self.problems: list[str] = []
        self.done: Counter[str] = Counter()
        self.turned_away: Counter[str] = Counter()
        self.accounts = [Account(f"tenants/{tenant}/adapters/a{i}") for i in range(3)]
        self._address = address
        self._kinds = kinds
        self._by_digest = {kind.digest: kind for kind in kinds.values()}
        self._go = go
        self._over = threading.Event()
        self._random = random.Random(seed)

    def end(self) -> None:
        self._over.set()

    def run(self) -> None:
        with Client(self._address, timeout=120) as client:
            while not self._over.is_set():
                if not self._go.wait(timeout=0.2):
                    continue
                with self.busy:
                    away = self._act(client)
                if away:
                    time.sleep(PAUSE)

    def verify(self, client: Client) -> None:
        """Compares all accounts with the server, and every version's answer with its content's."""
        for account in self.accounts:
            try:
                account.look(client)
                for number in account.state.versions:
                    self._generate(client, account, number)
                if account.state.promoted:
                    self._generate(client, account, None)
            except (DeltamuxError, ViolationError) as error:
                self.problems.append(f"{account.name}: {type(error).__name__}: {error}")

    def _act(self, client: Client) -> bool:
        """Makes one random call; returns whether the server was away."""
        account = self._random.choice(self.accounts)
        try:
            if account.doubtful is not None:
                account.look(client)
            what, call = self._choose(account)
            call(client, account)
            self.done[what] += 1
        except UnavailableError as error:
            self.turned_away[error.reason] += 1
            return True
        except (DeltamuxError, ViolationError) as error:
            self.problems.append(f"{account.name}: {type(error).__name__}: {error}")
        return False

    def _choose(self, account: Account) -> tuple[str, Callable[[Client, Account], None]]:
        state, rng = account.state, self._random
        idle = [number for number in state.versions if number != state.promoted[-1]]
        options: list[tuple[str, Callable[[Client, Account], None]]] = [("upload", self._upload)]
        if state.versions:
            number = rng.choice(list(state.versions))
            options += [("generate", lambda c, a: self._generate(c, a, rng.choice([None, number])))] * 3
            options += [
                ("promote", lambda c, a: _change(a, a.state.serving(number), lambda: c.promote(a.name, version=number)))
            ]
            options += [("pin", self._pin)]
            options += [("delete", lambda c, a: _change(a, a.state.deleted(), lambda: c.delete_adapter(a.name)))]
        if idle:
            gone = rng.choice(idle)
            version = f"{account.name}/versions/{gone}"
            options += [
                ("delete version", lambda c, a: _change(a, a.state.without(gone), lambda: c.delete_adapter(version)))
            ]
        if state.previous is not None:
            options += [("roll back", lambda c, a: _change(a, a.state.rolled_back(), lambda: c.rollback(a.name)))]
        return rng.choice(options)

    def _upload(self, client: Client, account: Account) -> None:
        kind = self._kinds[self._random.choice(list(self._kinds))]
        promote = self._random.random() < 0.5
        after = account.state.uploaded(kind.digest, promote)
        _change(account, after, lambda: client.upload_adapter(account.name, kind.directory, promote=promote or None))

    def _pin(self, client: Client, account: Account) -> None:
        from dataclasses import replace

        change = client.unpin_adapter if account.state.pinned else client.pin_adapter
        _change(account, replace(account.state, pinned=not account.state.pinned), lambda: change(account.name))

    def _generate(self, client: Client, account: Account, number: int | None) -> None:
        """Generates with a version, or with what the adapter serves."""
        serving = account.state.promoted[-1] if number is None else number
        name = account.name if number is None else f"{account.name}/versions/{number}"
        got, expected = answer(client, name), self._by_digest[account.state.versions[serving]].answer
        if got != expected:
            raise ViolationError(f"{name} answers {got}, and its content {expected}")


def _change(account: Account, after: State, call: Callable[[], object]) -> None:
    """Makes a change; between sending and answer it is unknown whether it is made."""
    account.doubtful = after
    try:
        call()
    except UnavailableError:
        raise
    except DeltamuxError:
        account.doubtful = None
        raise
    account.state, account.doubtful = after, None
