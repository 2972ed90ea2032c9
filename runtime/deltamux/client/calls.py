"""The calls of the API, for both clients: the RPC, its request, and the conversion of its response."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from typing import Any, Generic, ParamSpec, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from deltamux.client.results import Adapter, AdapterEvent, AdapterVersion, ApiKey, Generation, Tenant, Usage
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
    """

    method: str
    request: Any
    read: Callable[[Any], T]
    idempotent: bool = False
    new_request: Callable[[], Any] | None = None
    retry_refused: bool = False

    @property
    def retryable(self) -> bool:
        return self.idempotent or self.retry_refused


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list, and the token of the next one ("" after the last)."""

    items: list[T]
    next_token: str


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
def generate(prompt: Prompt, adapter: str | None, sampling: Mapping[str, Any], *, stream: bool) -> Call[Generation]:
    method = "Inference.GenerateStream" if stream else "Inference.Generate"
    request = inference_pb2.GenerateRequest(adapter=adapter or "", sampling=_sampling(sampling), **_prompt(prompt))
    return Call(method, request, _generation, retry_refused=True)


@checks_values
def get_adapter(name: str) -> Call[Adapter]:
    return Call("Adapters.GetAdapter", adapters_pb2.GetAdapterRequest(name=name), _adapter, True)


@checks_values
def get_adapter_version(name: str) -> Call[AdapterVersion]:
    return Call("Adapters.GetAdapterVersion", adapters_pb2.GetAdapterVersionRequest(name=name), read_version, True)


@checks_values
def list_adapters(parent: str, token: str) -> Call[Page[Adapter]]:
    request = adapters_pb2.ListAdaptersRequest(parent=parent, page_token=token)
    return Call("Adapters.ListAdapters", request, _page("adapters", _adapter), True)


@checks_values
def list_adapter_versions(parent: str, token: str) -> Call[Page[AdapterVersion]]:
    request = adapters_pb2.ListAdapterVersionsRequest(parent=parent, page_token=token)
    return Call("Adapters.ListAdapterVersions", request, _page("versions", read_version), True)


@checks_values
def compose(
    name: str, parts: Mapping[str, float] | Sequence[str], mode: str, promote: bool | None, labels: Mapping[str, str]
) -> Call[AdapterVersion]:
    weights = parts if isinstance(parts, Mapping) else dict.fromkeys(parts, 1.0)
    request = adapters_pb2.ComposeAdapterRequest(
        adapter=name,
        mode=adapters_pb2.CompositionMode.Value(f"COMPOSITION_MODE_{mode.upper()}"),
        parts=[adapters_pb2.CompositionPart(name=part, weight=weight) for part, weight in weights.items()],
        promote=promote,
        labels=labels,
    )
    return Call("Adapters.ComposeAdapter", request, read_version, retry_refused=True)


@checks_values
def promote(name: str, version: int, canary_percent: int) -> Call[Adapter]:
    request = adapters_pb2.PromoteAdapterRequest(name=name, version=version, canary_percent=canary_percent)
    return Call("Adapters.PromoteAdapter", request, _adapter, True)


@checks_values
def rollback(name: str) -> Call[Adapter]:
    return Call("Adapters.RollbackAdapter", adapters_pb2.RollbackAdapterRequest(name=name), _adapter)


@checks_values
def delete_adapter(name: str) -> Call[None]:
    if "/versions/" in name:
        request = adapters_pb2.DeleteAdapterVersionRequest(name=name)
        return Call("Adapters.DeleteAdapterVersion", request, _nothing)
    return Call("Adapters.DeleteAdapter", adapters_pb2.DeleteAdapterRequest(name=name), _nothing)


@checks_values
def pin_adapter(name: str) -> Call[Adapter]:
    return Call("Adapters.PinAdapter", adapters_pb2.PinAdapterRequest(name=name), _adapter, True)


@checks_values
def unpin_adapter(name: str) -> Call[Adapter]:
    return Call("Adapters.UnpinAdapter", adapters_pb2.UnpinAdapterRequest(name=name), _adapter, True)


@checks_values
def watch_adapters(parent: str) -> Call[AdapterEvent]:
    return Call("Adapters.WatchAdapters", adapters_pb2.WatchAdaptersRequest(parent=parent), _event, True)


@checks_values
def create_tenant(tenant: str) -> Call[Tenant]:
    return Call("Tenants.CreateTenant", tenants_pb2.CreateTenantRequest(tenant_id=tenant), _tenant)


@checks_values
def get_tenant(name: str) -> Call[Tenant]:
    return Call("Tenants.GetTenant", tenants_pb2.GetTenantRequest(name=name), _tenant, True)


@checks_values
def list_tenants(token: str) -> Call[Page[Tenant]]:
    return Call(
        "Tenants.ListTenants", tenants_pb2.ListTenantsRequest(page_token=token), _page("tenants", _tenant), True
    )


@checks_values
def delete_tenant(name: str, force: bool) -> Call[None]:
    return Call("Tenants.DeleteTenant", tenants_pb2.DeleteTenantRequest(name=name, force=force), _nothing)


@checks_values
def create_api_key(tenant: str) -> Call[ApiKey]:
    return Call("Tenants.CreateApiKey", tenants_pb2.CreateApiKeyRequest(parent=tenant), _api_key)


@checks_values
def list_api_keys(tenant: str, token: str) -> Call[Page[ApiKey]]:
    request = tenants_pb2.ListApiKeysRequest(parent=tenant, page_token=token)
    return Call("Tenants.ListApiKeys", request, _page("api_keys", _api_key), True)


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


def _page(field: str, read: Callable[[Any], T]) -> Callable[[Any], Page[T]]:
    return lambda message: Page([read(item) for item in getattr(message, field)], message.next_page_token)


def _nothing(message: Any) -> None:
    return None


def _time(stamp: Timestamp) -> Any:
    return stamp.ToDatetime(UTC)
