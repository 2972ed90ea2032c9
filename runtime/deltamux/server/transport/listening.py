"""The server's port: loopback by default, other addresses only with keys and TLS."""

import ipaddress
import os
import resource
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from deltamux.errors import FailedPreconditionError
from deltamux.server.options import ServeOptions, split_address
from deltamux.server.transport.certificates import TAKEN, check_tls, pem, tls_files_error
from deltamux.server.transport.limits import MAX_MESSAGE_BYTES

MAX_PENDING_CALLS = 1 << 16

MAX_CALLS_PER_CONNECTION = 4096
"""Concurrent calls (HTTP/2 streams) of one connection; gRPC's clients queue further ones.

Calls that a client resets at once count until the server has handled their end, so that they cannot fill its queue. So
do calls that were just answered: a client at the limit may be refused (UNAVAILABLE), so the limit is more than a
channel normally uses.
"""

SERVER_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two servers on one port would share its connections between them at random.
    ("grpc.so_reuseport", 0),
    # gRPC cancels a call beyond these without a status: large enough that every call is answered, if only with the
    # refusal of the server's own limits.
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    ("grpc.server_max_unrequested_time_in_server", 600),
    ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
    # A compressed message of 8 KiB can expand to 8 MiB, before a key is checked. Bit 0: no compression.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Clients may send keepalive pings at any rate; the server sends its own, to free what a vanished client held.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

MAX_DESCRIPTORS = 1 << 16
"""Each connection takes one, idle or not. Many systems have a soft limit of 1024 per process."""


def raise_descriptor_limit() -> None:
    """Raises this process's soft limit of open files, up to MAX_DESCRIPTORS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_exposure(options: ServeOptions) -> None:
    """Raises FailedPreconditionError if other machines could reach a server without keys or TLS."""
    if options.insecure or is_loopback(options.listen):
        return
    lacking = [
        what
        for what, given in (
            ("keys (--auth keys)", options.auth == "keys"),
            ("TLS (--tls-cert and --tls-key)", options.tls_cert is not None),
        )
        if not given
    ]
    if lacking:
        raise FailedPreconditionError(
            f"listening on {options.listen}, which other machines can reach, needs {' and '.join(lacking)}; "
            "or --insecure, if the network is trusted",
            reason="INSECURE_LISTEN",
            metadata={"listen": options.listen},
        )


def is_loopback(listen: str) -> bool:
    """Whether only this machine reaches the address; of host names, localhost only."""
    if listen.startswith("unix:"):
        return True
    host = split_address(listen)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(server: grpc.aio.Server, options: ServeOptions) -> str:
    """Binds the port and returns the address for clients.

    Raises:
        FailedPreconditionError: the address is taken or not this machine's, or the TLS files cannot be used.
    """
    check_tls(options)
    if _has_listener(options.listen):
        raise _cannot_listen(options, "another process listens there")
    try:
        if options.tls_cert is None:
            port = server.add_insecure_port(options.listen)
        else:
            port = server.add_secure_port(options.listen, _credentials(options))
    except RuntimeError as error:
        problem = _bind_problem(options.listen)
        if problem is None and options.tls_cert is not None:
            raise tls_files_error(options.tls_cert, f"or {options.tls_key} cannot be read by gRPC: {TAKEN}") from error
        raise _cannot_listen(options, problem or "the address is taken, or is not this machine's") from error
    return options.listen if options.listen.startswith("unix:") else f"{options.listen.rpartition(':')[0]}:{port}"


def _cannot_listen(options: ServeOptions, why: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"cannot listen on {options.listen}: {why}; choose another address with --listen",
        reason="ADDRESS_UNAVAILABLE",
        metadata={"listen": options.listen},
    )


def _has_listener(listen: str) -> bool:
    """Whether a Unix socket has a listener: gRPC would remove its file, and so disconnect that listener."""
    if not listen.startswith("unix:"):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(listen.removeprefix("unix:"))
        except OSError:
            return False
    return True


def _bind_problem(listen: str) -> str | None:
    """Returns the system's error for an address that gRPC could not bind, if it has one; gRPC only logs it."""
    try:
        if listen.startswith("unix:"):
            path = Path(listen.removeprefix("unix:"))
            os.stat(path.parent)
            return "the socket's file cannot be created" if not path.exists() else "its file is not a socket"
        host, port = split_address(listen)
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _credentials(options: ServeOptions) -> grpc.ServerCredentials:
    assert options.tls_cert is not None
    assert options.tls_key is not None
    return grpc.ssl_server_credentials([(pem(options.tls_key), pem(options.tls_cert))])
