"""The calls of the API: the RPC, its request, and the conversion of its response.

Both clients have them as methods, with these names, arguments and descriptions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from deltamux.client.results import (
    Adapter,
    AdapterEvent,
    AdapterVersion,
    ApiKey,
    Base,
    Generation,
    SiteSupport,
    Tenant,
    Usage,
)
from deltamux.errors import InvalidArgumentError
from deltamux.v1 import adapters_pb2, inference_pb2, tenants_pb2

T = TypeVar("T")
P = ParamSpec("P")

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages (mappings with ``role`` and ``content``)."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One RPC.

    Attributes:
        method: ``Service.Method``.
        idempotent: whether it may be sent again if the outcome of an attempt is unknown.
        new_request: returns the request of another attempt, if it is a stream; None: the same request.
        retry_refused: whether it may be sent again if it was refused with RetryInfo, though it is not idempotent.
        timeout: deadline in seconds, retries included; None for the connection's.
    """

    method: str
    request: Any
    read: Callable[[Any], T]
    idempotent: bool = False
    new_request: Callable[[], Any] | None = None
    retry_refused: bool = False
    timeout: float | None = None

    @property
    def retryable(self) -> bool:
        return self.idempotent or self.retry_refused


class Listing(Generic[T]):
    """The RPC of a list, which is called again for every page.

    Args:
        field: the entries in a response.

    Attributes:
        call: of the next page; returns the response as it is.
    """

    def __init__(self, method: str, request: Any, field: str, read: Callable[[Any], T]) -> None:
        self.call: Call[Any] = Call(method, request, lambda page: page, idempotent=True)
        self._field = field
        self._read = read

    def entries(self, page: Any) -> list[T]:
        """Returns the entries of a page, after which `call` is that of the next one."""
        self.call.request.page_token = page.next_page_token
        return [self._read(entry) for entry in getattr(page, self._field)]


@contextmanager
def checked_values() -> Iterator[None]:
    """Raises InvalidArgumentError for a value that a message of the block cannot hold."""
    try:
        yield
    except ValueError as error:  # including UnicodeEncodeError, for a lone surrogate
        raise InvalidArgumentError(
            f"a value cannot be sent: {str(error)[:200]}; text must be valid Unicode (no lone surrogates), "
            "and numbers within the field's range"
        ) from error


def checks_values(build: Callable[P, T]) -> Callable[P, T]:
    """Runs a function that builds a call inside `checked_values`."""
    return checked_values()(build)


@checks_values
def generate(
    prompt: Prompt, *, adapter: str | None = None, timeout: float | None = None, **sampling: Any
) -> Call[Generation]:
    """Generates to the end and returns the whole text.

    Args:
        prompt: text, token ids, or chat messages (mappings with role and content).
        adapter: resource name of an adapter or of one of its versions; None for the base.
        sampling: max_tokens, temperature, top_p, top_k, min_p, stop, seed, logprobs, json_schema, regex, choice and
            the others of `SamplingParameters` in inference.proto.
    """
    request = inference_pb2.GenerateRequest(adapter=adapter or "", sampling=_sampling(sampling), **_prompt(prompt))
    return Call("Inference.Generate", request, _generation, retry_refused=True, timeout=timeout)


def generate_stream(
    prompt: Prompt, *, adapter: str | None = None, timeout: float | None = None, **sampling: Any
) -> Call[Generation]:
    """Generates and yields increments as they come; closing the iterator aborts. Arguments as for `generate`."""
    whole = generate(prompt, adapter=adapter, timeout=timeout, **sampling)
    return replace(whole, method="Inference.GenerateStream")


def get_base() -> Call[Base]:
    """Returns the server's base model, and what it takes."""
    return Call("Inference.GetBase", inference_pb2.GetBaseRequest(), _base, True)


@checks_values
def get_adapter(name: str) -> Call[Adapter]:
    return Call("Adapters.GetAdapter", adapters_pb2.GetAdapterRequest(name=name), _adapter, True)


@checks_values
def get_adapter_version(name: str) -> Call[AdapterVersion]:
    return Call("Adapters.GetAdapterVersion", adapters_pb2.GetAdapterVersionRequest(name=name), read_version, True)


@checks_values
def list_adapters(parent: str) -> Listing[Adapter]:
    """Returns all adapters of ``tenants/{tenant}``."""
    return Listing("Adapters.ListAdapters", adapters_pb2.ListAdaptersRequest(parent=parent), "adapters", _adapter)


@checks_values
def list_adapter_versions(name: str) -> Listing[AdapterVersion]:
    request = adapters_pb2.ListAdapterVersionsRequest(parent=name)
    return Listing("Adapters.ListAdapterVersions", request, "versions", read_version)


@checks_values
def compose_adapter(
    name: str,
    parts: Mapping[str, float] | Sequence[str],
    *,
    mode: Literal["stack", "sum"] = "stack",
    promote: bool | None = None,
    labels: Mapping[str, str] | None = None,
) -> Call[AdapterVersion]:
    """Composes several versions to a new one.

    Args:
        parts: names of adapters or versions, in the order in which they apply; for a sum, with their weights.
        mode: ``stack`` applies one after the other, ``sum`` adds their changes.
    """
    weights = parts if isinstance(parts, Mapping) else dict.fromkeys(parts, 1.0)
    request = adapters_pb2.ComposeAdapterRequest(
        adapter=name,
        mode=adapters_pb2.CompositionMode.Value(f"COMPOSITION_MODE_{mode.upper()}"),
        parts=[adapters_pb2.CompositionPart(name=part, weight=weight) for part, weight in weights.items()],
        promote=promote,
        labels=labels or {},
    )
    return Call("Adapters.ComposeAdapter", request, read_version, retry_refused=True)


@checks_values
def promote(name: str, *, version: int, canary_percent: int = 0) -> Call[Adapter]:
    """Makes a version the serving one, or the canary with a share of the traffic in percent."""
    request = adapters_pb2.PromoteAdapterRequest(name=name, version=version, canary_percent=canary_percent)
    return Call("Adapters.PromoteAdapter", request, _adapter, True)


@checks_values
def rollback(name: str) -> Call[Adapter]:
    """Ends a canary; without one, returns to the version that served before."""
    return Call("Adapters.RollbackAdapter", adapters_pb2.RollbackAdapterRequest(name=name), _adapter)


@checks_values
def delete_adapter(name: str) -> Call[None]:
    """Deletes an adapter, or one version that does not serve; running requests are not affected."""
    if "/versions/" in name:
        request = adapters_pb2.DeleteAdapterVersionRequest(name=name)
        return Call("Adapters.DeleteAdapterVersion", request, _nothing)
    return Call("Adapters.DeleteAdapter", adapters_pb2.DeleteAdapterRequest(name=name), _nothing)


@checks_values
def pin_adapter(name: str) -> Call[Adapter]:
    """Keeps the serving version in the engine's memory until `unpin_adapter`."""
    return Call("Adapters.PinAdapter", adapters_pb2.PinAdapterRequest(name=name), _adapter, True)


@checks_values
def unpin_adapter(name: str) -> Call[Adapter]:
    return Call("Adapters.UnpinAdapter", adapters_pb2.UnpinAdapterRequest(name=name), _adapter, True)


@checks_values
def watch_adapters(parent: str) -> Call[AdapterEvent]:
    """Yields the present state of a tenant's adapters (or of one adapter), then every change, until closed."""
    return Call("Adapters.WatchAdapters", adapters_pb2.WatchAdaptersRequest(parent=parent), _event, True)


@checks_values
def create_tenant(tenant: str) -> Call[Tenant]:
    return Call("Tenants.CreateTenant", tenants_pb2.CreateTenantRequest(tenant_id=tenant), _tenant)


@checks_values
def get_tenant(name: str) -> Call[Tenant]:
    return Call("Tenants.GetTenant", tenants_pb2.GetTenantRequest(name=name), _tenant, True)


def list_tenants() -> Listing[Tenant]:
    return Listing("Tenants.ListTenants", tenants_pb2.ListTenantsRequest(), "tenants", _tenant)


@checks_values
def delete_tenant(name: str, *, force: bool = False) -> Call[None]:
    """Deletes a tenant and its keys; with `force` also its adapters."""
    return Call("Tenants.DeleteTenant", tenants_pb2.DeleteTenantRequest(name=name, force=force), _nothing)


@checks_values
def create_api_key(tenant: str) -> Call[ApiKey]:
    """Creates a key for ``tenants/{tenant}``; its secret is in this result only."""
    return Call("Tenants.CreateApiKey", tenants_pb2.CreateApiKeyRequest(parent=tenant), _api_key)


@checks_values
def list_api_keys(tenant: str) -> Listing[ApiKey]:
    return Listing("Tenants.ListApiKeys", tenants_pb2.ListApiKeysRequest(parent=tenant), "api_keys", _api_key)


@checks_values
def delete_api_key(name: str) -> Call[None]:
    return Call("Tenants.DeleteApiKey", tenants_pb2.DeleteApiKeyRequest(name=name), _nothing)


# Requests.


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    if all(isinstance(item, int) for item in prompt):
        return {"token_ids": inference_pb2.TokenIds(values=prompt)}  # type: ignore[arg-type]  # all are int
    try:
        given: Any = prompt  # its items are checked here
        messages = [inference_pb2.ChatMessage(role=m["role"], content=m["content"]) for m in given]
    except (TypeError, KeyError):
        raise InvalidArgumentError(
            "a prompt is text, a list of token ids, or a list of messages with role and content",
            metadata={"field": "prompt"},
        ) from None
    return {"chat": inference_pb2.Chat(messages=messages)}


def _sampling(options: Mapping[str, Any]) -> inference_pb2.SamplingParameters:
    given = {name: value for name, value in options.items() if value is not None}
    formats = {name: given.pop(name) for name in ("json_schema", "regex", "choice") if name in given}
    if len(formats) > 1:
        raise InvalidArgumentError(f"give one of {', '.join(formats)}", metadata={"field": "structured_output"})
    if "choice" in formats:
        formats["choice"] = inference_pb2.Choice(options=formats["choice"])
    if formats:
        given["structured_output"] = inference_pb2.StructuredOutput(**formats)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        return inference_pb2.SamplingParameters(**given)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"sampling options: {error}", metadata={"field": "sampling"}) from error


# Responses.


def _base(message: Any) -> Base:
    sites = (
        SiteSupport(s.kind, s.num_supported, s.num_refused, {site.name: site.reason for site in s.refused})
        for s in message.sites
    )
    return Base(
        message.architecture,
        message.fingerprint,
        message.num_parameters,
        message.max_model_len,
        message.dtype,
        message.dtype_reason,
        tuple(sites),
        {method.name: method.refusal for method in message.methods},
    )


def _generation(message: inference_pb2.GenerateResponse) -> Generation:
    stop = message.WhichOneof("stop")
    finish = inference_pb2.FinishReason.Name(message.finish_reason).removeprefix("FINISH_REASON_").lower()
    return Generation(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs),
        top_logprobs=tuple(tuple(zip(top.token_ids, top.logprobs, strict=True)) for top in message.top_logprobs),
        finish_reason=None if finish == "unspecified" else finish,
        stop_reason=getattr(message, stop) if stop else None,
        usage=Usage(message.usage.prompt_tokens, message.usage.completion_tokens, message.usage.cached_tokens),
        adapter_version=message.adapter_version or None,
        request_id=message.request_id,
    )


def read_version(message: adapters_pb2.AdapterVersion) -> AdapterVersion:
    state = adapters_pb2.AdapterVersionState.Name(message.state).removeprefix("ADAPTER_VERSION_STATE_")
    return AdapterVersion(
        name=message.name,
        version=message.version,
        digest=message.digest,
        method=message.method,
        state=state,
        rank=message.rank,
        num_virtual_tokens=message.num_virtual_tokens,
        size_bytes=message.size_bytes,
        created=_time(message.create_time),
        labels=dict(message.labels),
    )


def _adapter(message: adapters_pb2.Adapter) -> Adapter:
    return Adapter(
        name=message.name,
        serving_version=message.serving_version,
        previous_version=message.previous_version or None,
        canary_version=message.canary.version or None,
        canary_percent=message.canary.percent,
        pinned=message.pinned,
        created=_time(message.create_time),
        updated=_time(message.update_time),
        problem=message.problem,
    )


def _event(message: adapters_pb2.AdapterEvent) -> AdapterEvent:
    kind = adapters_pb2.AdapterEvent.Type.Name(message.type)
    return AdapterEvent(kind, _adapter(message.adapter), message.version or None)


def _tenant(message: tenants_pb2.Tenant) -> Tenant:
    return Tenant(message.name, _time(message.create_time))


def _api_key(message: tenants_pb2.ApiKey) -> ApiKey:
    return ApiKey(message.name, _time(message.create_time), message.secret or None)


def _nothing(message: Any) -> None:
    return None


def _time(stamp: Timestamp) -> Any:
    return stamp.ToDatetime(UTC)
