"""The results of the clients: frozen dataclasses, no protos."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True)
class SiteSupport:
    """The sites of one kind: the places of a base model that an adapter may change.

    Attributes:
        kind: ``linear``, ``norm``, ``block``, ``attention``, ``experts``, ``embedding`` or ``head``.
        refused: names of sites that take no deltas, with the reason; at most 100 of `num_refused`.
    """

    kind: str
    num_supported: int
    num_refused: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """The base model of a server, and what it takes.

    Attributes:
        architecture: such as ``LlamaForCausalLM``.
        fingerprint: names the weights.
        max_model_len: longest sequence in tokens.
        dtype: of the weights as they run; dtype_reason: why that one.
        methods: names of the methods that train, with the reason for which their adapters do not fit; "" where they do.
    """

    architecture: str
    fingerprint: str
    num_parameters: int
    max_model_len: int
    dtype: str
    dtype_reason: str
    sites: tuple[SiteSupport, ...] = ()
    methods: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """The token counts of a request, without virtual tokens of the adapter.

    Attributes:
        cached_tokens: the prompt's tokens from the prefix cache.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """A generation; in a stream, the increment since the last one.

    Attributes:
        logprobs: natural logarithms, one per generated token; empty unless requested.
        top_logprobs: the likeliest (token id, log-probability) of each position; empty unless requested.
        finish_reason: ``stop`` or ``length`` at the end of the generation, else None.
        stop_reason: the stop string or stop token that ended it, if any.
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
        digest: sha256 of its content, in hex.
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
    """An adapter: a name that is routed to one of its versions.

    Attributes:
        serving_version: the version that the name is routed to.
        previous_version: the version that a rollback returns to, if any.
        canary_version, canary_percent: the version with a share of the traffic, if any.
        problem: why it is pinned but not in the engine's memory; "" if it is.
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
        type: STATE (at the start of the watch), VERSION_CREATED, UPDATED, VERSION_DELETED or DELETED.
        version: the number of the version, for events of versions.
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
    """An API key; `secret` is set in the result of its creation only."""

    name: str
    created: datetime
    secret: str | None = None
