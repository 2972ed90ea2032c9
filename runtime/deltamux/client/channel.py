"""Connections of both clients: addresses, keys, and errors from `google.rpc.Status`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]  # its .pyi files come without py.typed
from grpc_status import rpc_status

from deltamux.errors import DeltamuxError, InvalidArgumentError

MAX_MESSAGE_BYTES = 64 << 20

OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

MAX_PORT = (1 << 16) - 1

TLS_FAILED = "TLS_FAILED"
"""Reason of an error that is not retried."""

INVALID_TARGET = "the target uri is not valid"
"""Part of gRPC's message for an address that it makes no channel for; its status is INTERNAL."""

_TLS_HINTS = {
    "certificate has expired": "its certificate has expired, or this machine's clock is wrong. ",
    "certificate is not yet valid": "its certificate is not valid yet, or this machine's clock is wrong. ",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not signed by an authority that this client trusts; pass the "
    "authority's PEM (tls=..., --tls-ca). ",
    "Hostname Verification Check failed": "its certificate is for another name than this address; connect by the name "
    "in the certificate. ",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; connect without. ",
    "Failed to create security handshaker": "the authority's certificate (tls=..., --tls-ca) is not valid PEM. ",
    "Handshake read failed": "it ended the TLS handshake: it has no TLS, or a kind of key that gRPC's clients refuse. ",
    "Socket closed": "it closed the connection, as one with TLS does to a client without (tls=True, --tls). ",
}
"""Parts of gRPC's messages for failed connections, and what they mean."""


@dataclass(frozen=True)
class Connection:
    """The settings of a connection.

    Attributes:
        address: ``host:port`` or ``unix:path``.
        api_key: sent with every call; None if the server requires none.
        tls: True for the system's root certificates, or PEM bytes of the authority to trust; False for no TLS.
        timeout: deadline of a call in seconds, retries included; None for none.
        retries: attempts after the first, see `deltamux.client.retrying`.
    """

    address: str
    api_key: str | None = None
    tls: bool | bytes = False
    timeout: float | None = None
    retries: int = 0

    def __post_init__(self) -> None:
        _check_address(self.address)
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise InvalidArgumentError(
                f"timeout must be more than 0 seconds, or None; not {self.timeout}", metadata={"field": "timeout"}
            )
        if self.retries < 0:
            raise InvalidArgumentError(f"retries must be 0 or more, not {self.retries}", metadata={"field": "retries"})

    def channel(self, module: Any) -> Any:
        """Returns a channel of a module, which is `grpc` or `grpc.aio`."""
        if self.tls is False:
            return module.insecure_channel(self.address, options=OPTIONS)
        credentials = grpc.ssl_channel_credentials(self.tls if isinstance(self.tls, bytes) else None)
        return module.secure_channel(self.address, credentials, options=OPTIONS)

    def metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.api_key}")] if self.api_key else []


def _check_address(address: str) -> None:
    """Raises InvalidArgumentError for an address that gRPC takes for another one, or for none."""
    host, _, port = address.rpartition(":")
    has_port = host and port.isdecimal() and not address.startswith("unix")
    if not address.strip() or address.startswith(("http://", "https://")):
        problem = "is host:port or unix:path"
    elif has_port and (len(port) > len(str(MAX_PORT)) or int(port) > MAX_PORT):
        problem = f"has a port of at most {MAX_PORT}"  # gRPC would connect to the remainder
    else:
        return
    raise _invalid_address(f"{problem}, not {address!r}")


def _invalid_address(problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the server's address {problem}", metadata={"field": "address"})


def error_of(raised: grpc.RpcError) -> DeltamuxError:
    """Returns the `DeltamuxError` of a status, with its class, message, reason, metadata and retry time."""
    code: grpc.StatusCode = raised.code()
    message: str = raised.details() or code.name
    reason, metadata = code.name, dict[str, str]()
    retry_after: float | None = None
    status = rpc_status.from_call(raised)  # type: ignore[arg-type]  # an RpcError of a call is a Call, too
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    if status is None and INVALID_TARGET in message:
        return _invalid_address(f"is host:port or unix:path ({message})")
    if code is grpc.StatusCode.UNAVAILABLE and status is None:
        hint = next((hint for sign, hint in _TLS_HINTS.items() if sign in message), "")
        reason = TLS_FAILED if hint and "Socket closed" not in message else reason
        message = f"the server cannot be reached: {hint}{message}"
    return _class_of(code.name, reason)(message, reason=reason, metadata=metadata, retry_after=retry_after)


def _class_of(status: str, reason: str) -> type[DeltamuxError]:
    candidates = [c for c in _descendants(DeltamuxError) if c.status == status]
    return next((c for c in candidates if c.default_reason == reason), candidates[0] if candidates else DeltamuxError)


def _descendants(root: type[DeltamuxError]) -> Iterator[type[DeltamuxError]]:
    """Yields a class's descendants, parents before children."""
    for child in root.__subclasses__():
        yield child
        yield from _descendants(child)
