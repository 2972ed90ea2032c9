"""The client for threads."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import grpc

from deltamux.client import calls
from deltamux.client.base import BaseClient
from deltamux.client.calls import Call, Page, Prompt
from deltamux.client.channel import error_of
from deltamux.client.results import Adapter, AdapterEvent, AdapterVersion, ApiKey, Generation, Tenant
from deltamux.client.uploads import Progress, upload_call

T = TypeVar("T")


class Client(BaseClient):
    """A connection to a deltamux server; safe to share between threads. Close it, or use it as a context manager.

    Args:
        address: ``host:port`` or ``unix:path``.
        api_key: sent with every call, if the server requires one.
        tls: True for the system's root certificates, or PEM bytes of the authority to trust.
        timeout: deadline of a call in seconds, retries included; None for none.
        retries: most attempts after the first, of reads, uploads, and generations of which no token was received, that
            were refused with RetryInfo, after the time in it. 0 for none.

    Every method raises `deltamux.errors.DeltamuxError`; each error has ``.code`` (a grpc.StatusCode), ``.reason`` and
    ``.metadata``.
    """

    def close(self) -> None:
        """Closes the connection and cancels running calls."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self, prompt: Prompt, *, adapter: str | None = None, timeout: float | None = None, **sampling: Any
    ) -> Generation:
        """Generates to the end and returns the whole text.

        Args:
            prompt: text, token ids, or chat messages (mappings with role and content).
            adapter: resource name of an adapter or of one of its versions; None for the base.
            sampling: max_tokens, temperature, top_p, top_k, min_p, stop, seed, logprobs, json_schema, regex, choice and
                the others of `SamplingParameters` in inference.proto.
        """
        return self._unary(calls.generate(prompt, adapter, sampling, stream=False), timeout)

    def generate_stream(
        self, prompt: Prompt, *, adapter: str | None = None, timeout: float | None = None, **sampling: Any
    ) -> Iterator[Generation]:
        """Generates and yields increments as they come; closing the iterator aborts. Arguments as for `generate`."""
        return self._stream(calls.generate(prompt, adapter, sampling, stream=True), timeout)

    def upload_adapter(
        self,
        name: str,
        path: str | Path,
        *,
        method: str = "",
        promote: bool | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> AdapterVersion:
        """Uploads an adapter's directory as a new version; the same content again is the same version.

        Args:
            name: ``tenants/{tenant}/adapters/{adapter}``.
            path: directory with adapter_config.json and adapter_model.safetensors.
            promote: True serves the version at once; None does so for an adapter's first version only.
            progress: called with the bytes sent and all bytes.
        """
        call = upload_call(name, path, method=method, promote=promote, labels=labels, progress=progress)
        return self._unary(call, timeout)

    def get_adapter(self, name: str) -> Adapter:
        return self._unary(calls.get_adapter(name))

    def get_adapter_version(self, name: str) -> AdapterVersion:
        return self._unary(calls.get_adapter_version(name))

    def list_adapters(self, parent: str) -> list[Adapter]:
        """Returns all adapters of ``tenants/{tenant}``."""
        return self._all(lambda token: calls.list_adapters(parent, token))

    def list_adapter_versions(self, name: str) -> list[AdapterVersion]:
        return self._all(lambda token: calls.list_adapter_versions(name, token))

    def compose_adapter(
        self,
        name: str,
        parts: Mapping[str, float] | Sequence[str],
        *,
        mode: Literal["stack", "sum"] = "stack",
        promote: bool | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> AdapterVersion:
        """Composes several versions to a new one.

        Args:
            parts: names of adapters or versions, in the order in which they apply; for a sum, with their weights.
            mode: ``stack`` applies one after the other, ``sum`` adds their changes.
        """
        return self._unary(calls.compose(name, parts, mode, promote, labels or {}))

    def promote(self, name: str, *, version: int, canary_percent: int = 0) -> Adapter:
        """Makes a version the serving one, or the canary with a share of the traffic in percent."""
        return self._unary(calls.promote(name, version, canary_percent))

    def rollback(self, name: str) -> Adapter:
        """Ends a canary; without one, returns to the version that served before."""
        return self._unary(calls.rollback(name))

    def delete_adapter(self, name: str) -> None:
        """Deletes an adapter, or one version that does not serve; running requests are not affected."""
        return self._unary(calls.delete_adapter(name))

    def pin_adapter(self, name: str) -> Adapter:
        """Keeps the serving version in the engine's memory until `unpin_adapter`."""
        return self._unary(calls.pin_adapter(name))

    def unpin_adapter(self, name: str) -> Adapter:
        return self._unary(calls.unpin_adapter(name))

    def watch_adapters(self, parent: str) -> Iterator[AdapterEvent]:
        """Yields the present state of a tenant's adapters (or of one adapter), then every change, until closed."""
        return self._stream(calls.watch_adapters(parent))

    def create_tenant(self, tenant: str) -> Tenant:
        return self._unary(calls.create_tenant(tenant))

    def get_tenant(self, name: str) -> Tenant:
        return self._unary(calls.get_tenant(name))

    def list_tenants(self) -> list[Tenant]:
        return self._all(calls.list_tenants)

    def delete_tenant(self, name: str, *, force: bool = False) -> None:
        """Deletes a tenant and its keys; with `force` also its adapters."""
        return self._unary(calls.delete_tenant(name, force))

    def create_api_key(self, tenant: str) -> ApiKey:
        """Creates a key for ``tenants/{tenant}``; its secret is in this result only."""
        return self._unary(calls.create_api_key(tenant))

    def list_api_keys(self, tenant: str) -> list[ApiKey]:
        return self._all(lambda token: calls.list_api_keys(tenant, token))

    def delete_api_key(self, name: str) -> None:
        return self._unary(calls.delete_api_key(name))

    def _unary(self, call: Call[T], timeout: float | None = None) -> T:
        attempts = self._attempts(call, timeout)
        while True:
            try:
                return call.read(self._start(call, attempts))
            except grpc.RpcError as raised:
                error = error_of(raised)
                if (pause := attempts.pause(error)) is None:
                    raise error from raised
            time.sleep(pause)

    def _stream(self, call: Call[T], timeout: float | None = None) -> Iterator[T]:
        attempts = self._attempts(call, timeout)
        begun = False
        while True:
            stream = self._start(call, attempts)
            try:
                for message in stream:
                    begun = True
                    yield call.read(message)
                return
            except grpc.RpcError as raised:
                error = error_of(raised)
                pause = None if begun else attempts.pause(error)
                if pause is None:
                    raise error from raised
            finally:
                stream.cancel()
            time.sleep(pause)

    def _all(self, page: Callable[[str], Call[Page[T]]]) -> list[T]:
        found: list[T] = []
        token = ""
        while True:
            answer = self._unary(page(token))
            found += answer.items
            if not (token := answer.next_token):
                return found
