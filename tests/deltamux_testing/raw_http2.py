"""A client of gRPC that speaks HTTP/2 itself, for what gRPC's own clients cannot be made to do."""

from __future__ import annotations

import socket
import struct
from contextlib import closing
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
INITIAL_WINDOW_SIZE = 4


class RawConnection:
    """A connection whose streams have no window: the server may send headers, and not a byte of a message."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._streams = 0
        self._socket.sendall(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with closing(self._socket):
            self._socket.shutdown(socket.SHUT_RDWR)

    def call(self, path: str, message: bytes = b"") -> None:
        """Begins a call with one message, and reads nothing."""
        stream, self._streams = 2 * self._streams + 1, self._streams + 1
        body = struct.pack(">BI", 0, len(message)) + message
        self._socket.sendall(frame(HEADERS, 4, stream, headers(path)) + frame(DATA, 1, stream, body))


def headers(path: str) -> bytes:
    """Returns a call's headers as HPACK writes them without its tables."""
    named = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "test"}
    named |= {"te": "trailers", "content-type": "application/grpc"}
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in named.items())


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _string(text: str) -> bytes:
    assert len(text) < 127, "longer ones have their length in several bytes"
    return bytes([len(text)]) + text.encode()
