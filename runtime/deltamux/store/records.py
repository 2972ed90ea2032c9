"""The store's immutable records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

ID = r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?"
"""Pattern of the ids of tenants, adapters and keys."""


class VersionState(StrEnum):
    """The state of a version.

    READY: requests may use it. DRAINING: it was deleted, and is removed after the last request that holds it.
    DAMAGED: its compiled program is missing or damaged; it serves again once the same files are uploaded again. The
    database has READY and DRAINING; DAMAGED follows from the state of the program.
    """

    READY = "READY"
    DRAINING = "DRAINING"
    DAMAGED = "DAMAGED"


class AdapterKey(NamedTuple):
    tenant: str
    adapter: str

    def __str__(self) -> str:
        return f"tenants/{self.tenant}/adapters/{self.adapter}"


class VersionKey(NamedTuple):
    tenant: str
    adapter: str
    number: int

    @property
    def parent(self) -> AdapterKey:
        return AdapterKey(self.tenant, self.adapter)

    def __str__(self) -> str:
        return f"{self.parent}/versions/{self.number}"


@dataclass(frozen=True)
class TenantRecord:
    tenant: str
    created: datetime


@dataclass(frozen=True)
class ApiKeyRecord:
    """An API key; its secret is returned at its creation only, and stored as a hash."""

    tenant: str
    key: str
    created: datetime


@dataclass(frozen=True)
class Canary:
    """A version that gets `percent` of an adapter's traffic."""

    number: int
    percent: int


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter: a name that routes to one of its versions.

    Attributes:
        serving: number of the version that the name is routed to; 0 if it is unknown, as rows are damaged.
        previous: the serving version before it, which a rollback returns to.
    """

    key: AdapterKey
    serving: int
    previous: int | None
    canary: Canary | None
    pinned: bool
    created: datetime
    updated: datetime


@dataclass(frozen=True)
class CompiledAdapter:
    """The description of an adapter that has passed the quarantine.

    Attributes:
        digest: sha256 of the uploaded files, in hex: the version's identity.
        rank: widest inner dimension of any op.
        num_bytes: size of the compiled program.
        base_fingerprint: of the base that the program was compiled for; "" if it is not known.
    """

    digest: str
    method: str
    rank: int
    num_virtual_tokens: int
    num_bytes: int
    base_fingerprint: str = ""


@dataclass(frozen=True)
class VersionRecord:
    """One immutable version.

    Attributes:
        program: the compiled file that the engine reads.
        program_sha256: of that file, in hex, checked at every read.
        damage: the program's problem; "" if none is known.
    """

    key: VersionKey
    compiled: CompiledAdapter
    state: VersionState
    created: datetime
    program: Path
    program_sha256: str = ""
    damage: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
