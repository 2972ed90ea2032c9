"""What the client returns: frozen dataclasses, no protos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; virtual tokens of the adapter are not among them.

    Attributes:
        cached_tokens: of the prompt's tokens, how many the server had in its prefix cache.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """What was generated; in a stream, what was generated since the chunk before.

    Attributes:
        logprobs: one natural logarithm a generated token; empty unless asked for.
        top_logprobs: the likeliest (token id, log-probability) of each position; empty unless asked for.
        finish_reason: ``stop`` or ``length`` once the generation is at its end, else None.
        stop_reason: the stop string or stop token that ended it, if one did.
        adapter_version: resource name of the version that served; None for the base.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    usage: Usage = Usage()
    adapter_version: str | None = None
    request_id: str = ""


@dataclass(frozen=True)
class AdapterVersion:
    """An immutable version of an adapter.

    Attributes:
        name: ``tenants/{tenant}/adapters/{adapter}/versions/{version}``.
        digest: identity of its content, sha256 in hex.
        state: ``READY``, ``DRAINING`` or ``DAMAGED``.
    """

    name: str
    version: int
    digest: str
    method: str
    state: str
    rank: int
    num_virtual_tokens: int
    size_bytes: int
    created: datetime
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """An adapter: a name that serves one of its versions.

    Attributes:
        serving_version: the version that the name means; previous_version: what a rollback returns to, None if nothing.
        canary_version, canary_percent: the version that gets a share of the traffic, if one does.
        problem: why it is pinned and yet not in the engine's memory; "" where nothing is wrong.
    """

    name: str
    serving_version: int
    previous_version: int | None
    canary_version: int | None
    canary_percent: int
    pinned: bool
    created: datetime
    updated: datetime
    problem: str = ""


@dataclass(frozen=True)
class AdapterEvent:
    """A change, as `watch_adapters` reports it.

    Attributes:
        type: STATE (as it is when the watch begins), VERSION_CREATED, UPDATED, VERSION_DELETED or DELETED.
        version: the number of the version concerned, None where it concerns none.
    """

    type: str
    adapter: Adapter
    version: int | None


@dataclass(frozen=True)
class Tenant:
    name: str
    created: datetime


@dataclass(frozen=True)
class ApiKey:
    """An API key; `secret` is there in the answer to its creation only."""

    name: str
    created: datetime
    secret: str | None = None
