"""Translation of the store's records, and of what the base takes, to messages."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from deltamux.deltas import BaseModel, BaseSupport
from deltamux.store import AdapterRecord, ApiKeyRecord, TenantRecord, VersionRecord, VersionState
from deltamux.v1 import adapters_pb2, inference_pb2, tenants_pb2

MAX_REFUSED = 100
"""Sites of one kind that a message names."""

_STATES = {
    VersionState.READY: adapters_pb2.ADAPTER_VERSION_STATE_READY,
    VersionState.DRAINING: adapters_pb2.ADAPTER_VERSION_STATE_DRAINING,
    VersionState.DAMAGED: adapters_pb2.ADAPTER_VERSION_STATE_DAMAGED,
}


def adapter_message(record: AdapterRecord, problem: str = "") -> adapters_pb2.Adapter:
    split = record.canary
    canary = None if split is None else adapters_pb2.Canary(version=split.number, percent=split.percent)
    return adapters_pb2.Adapter(
        name=str(record.key),
        serving_version=record.serving,
        previous_version=record.previous or 0,
        canary=canary,
        pinned=record.pinned,
        create_time=_timestamp(record.created),
        update_time=_timestamp(record.updated),
        problem=problem,
    )


def version_message(record: VersionRecord) -> adapters_pb2.AdapterVersion:
    compiled = record.compiled
    return adapters_pb2.AdapterVersion(
        name=str(record.key),
        version=record.key.number,
        digest=compiled.digest,
        method=compiled.method,
        state=_STATES[record.state],
        rank=compiled.rank,
        num_virtual_tokens=compiled.num_virtual_tokens,
        size_bytes=compiled.num_bytes,
        labels=record.labels,
        create_time=_timestamp(record.created),
    )


def base_message(
    base: BaseModel, max_model_len: int, support: BaseSupport, methods: Mapping[str, str]
) -> inference_pb2.Base:
    """Returns a base and what it takes; `methods` has the reason of a refusal by name, "" for one that fits."""
    refused: dict[str, list[inference_pb2.RefusedSite]] = defaultdict(list)
    for (kind, name), reason in support.refused.items():
        refused[kind].append(inference_pb2.RefusedSite(name=name, reason=reason))
    supported = Counter(kind for kind, _ in support.sites)
    return inference_pb2.Base(
        architecture=base.architecture,
        fingerprint=base.fingerprint,
        num_parameters=base.num_parameters,
        max_model_len=max_model_len,
        dtype=support.dtype,
        dtype_reason=support.dtype_reason,
        sites=[
            inference_pb2.SiteSupport(
                kind=kind,
                num_supported=supported[kind],
                num_refused=len(refused[kind]),
                refused=refused[kind][:MAX_REFUSED],
            )
            for kind in sorted({*supported, *refused})
        ],
        methods=[inference_pb2.MethodSupport(name=name, refusal=why) for name, why in sorted(methods.items())],
    )


def tenant_message(record: TenantRecord) -> tenants_pb2.Tenant:
    return tenants_pb2.Tenant(name=f"tenants/{record.tenant}", create_time=_timestamp(record.created))


def api_key_message(record: ApiKeyRecord, secret: str = "") -> tenants_pb2.ApiKey:
    name = f"tenants/{record.tenant}/keys/{record.key}"
    return tenants_pb2.ApiKey(name=name, create_time=_timestamp(record.created), secret=secret)


def _timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp
