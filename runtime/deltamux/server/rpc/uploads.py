"""The stream of an upload: chunks of files, written to the staging directory one at a time."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from deltamux.adapter_files import CONFIG_FILE, REQUIRED_FILES, TENSORS_FILE
from deltamux.errors import DeadlineExceededError, InvalidAdapterError, InvalidArgumentError
from deltamux.server.access.concurrency import Permit
from deltamux.server.disk import DiskThreads
from deltamux.server.options import MIB
from deltamux.v1 import adapters_pb2 as pb

SMALL_FILES = (CONFIG_FILE, "README.md", "LICENSE")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_SMALL_FILE_BYTES = MIB
MAX_CHUNK_BYTES = MIB


@dataclass(frozen=True)
class UploadLimits:
    """The bounds of an upload.

    Attributes:
        max_bytes: all files together.
        idle_seconds: longest time between two messages.
        min_bytes_per_second: least mean rate; waiting may take as long as the received bytes do at this rate, plus
            `idle_seconds`.
    """

    max_bytes: int
    idle_seconds: float = 60.0
    min_bytes_per_second: int = 256 << 10

    @property
    def contended_seconds(self) -> float:
        """Seconds that an upload may be behind its least rate while another tenant's waits: a chunk's, and one more."""
        return min(self.idle_seconds, 1.0 + MAX_CHUNK_BYTES / self.min_bytes_per_second)


async def read_header(messages: AsyncIterator[pb.UploadAdapterRequest], limits: UploadLimits) -> pb.UploadHeader:
    """Returns the first message, its list of files checked.

    Raises:
        InvalidArgumentError: the stream does not begin with a header.
        InvalidAdapterError: the list of files is refused.
    """
    first = await _PacedMessages(messages, limits).next()
    if first is None or first.WhichOneof("message") != "header":
        raise InvalidArgumentError(
            "the first message of an upload must be its header", reason="UPLOAD_PROTOCOL", metadata={"field": "header"}
        )
    check_files(first.header.files, limits)
    return first.header


def check_files(files: Iterable[pb.FileInfo], limits: UploadLimits) -> None:
    """Refuses files that are not an adapter's, and sizes beyond the limits, before any content is received."""
    sizes: dict[str, int] = {}
    for file in files:
        _check_name(file.path)
        if file.path in sizes:
            raise _invalid_file(file.path, "is listed twice", "DUPLICATE_FILE")
        limit = MAX_SMALL_FILE_BYTES if file.path in SMALL_FILES else limits.max_bytes
        if not 0 < file.size_bytes <= limit:
            raise _invalid_file(file.path, f"has {file.size_bytes} bytes; 1 to {limit} are allowed", "FILE_SIZE")
        sizes[file.path] = file.size_bytes
    for name in REQUIRED_FILES:
        if name not in sizes:
            raise _invalid_file(name, "is missing from the upload", "MISSING_FILE")
    if sum(sizes.values()) > limits.max_bytes:
        raise _invalid_file(
            TENSORS_FILE, f"is too large: all files take {sum(sizes.values())} of {limits.max_bytes} bytes", "FILE_SIZE"
        )


async def receive_files(
    header: pb.UploadHeader,
    messages: AsyncIterator[pb.UploadAdapterRequest],
    directory: Path,
    limits: UploadLimits,
    threads: DiskThreads,
    permit: Permit,
) -> None:
    """Writes the files into a directory, which must be empty.

    Args:
        threads: for disk access.
        permit: the upload's; a slow upload is cancelled while others wait.

    Raises:
        InvalidAdapterError: a file is truncated, longer than its declared size, or has another checksum.
        InvalidArgumentError: a message is not a chunk, or too large.
        DeadlineExceededError: the upload was idle, or is too slow.
    """
    permit.holder = paced = _PacedMessages(messages, limits)
    with _IncomingFiles.open(directory, header.files) as incoming:
        while (message := await paced.next()) is not None:
            await threads.run(incoming.add, _chunk(message))
        permit.holder = None
        await threads.run(incoming.check_complete)


@dataclass
class _File:
    info: pb.FileInfo
    stream: BinaryIO
    received: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


class _IncomingFiles:
    """The files of one upload while they are written."""

    def __init__(self, files: Mapping[str, _File]) -> None:
        self._files = files

    @classmethod
    def open(cls, directory: Path, infos: Iterable[pb.FileInfo]) -> Self:
        # "x": an existing file or link is never written to.
        return cls({info.path: _File(info, (directory / info.path).open("xb")) for info in infos})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        with ExitStack() as stack:  # on a full disk any of them may fail
            for file in self._files.values():
                stack.callback(file.stream.close)

    def add(self, chunk: pb.FileChunk) -> None:
        if chunk.path not in self._files:
            raise InvalidArgumentError(
                f"a chunk has path {chunk.path[:80]!r}, which the header does not list",
                reason="UPLOAD_PROTOCOL",
                metadata={"field": "chunk.path"},
            )
        file = self._files[chunk.path]
        if file.received + len(chunk.data) > file.info.size_bytes:
            raise _invalid_file(chunk.path, f"is longer than the {file.info.size_bytes} bytes declared", "FILE_SIZE")
        file.stream.write(chunk.data)
        file.digest.update(chunk.data)
        file.received += len(chunk.data)

    def check_complete(self) -> None:
        for name, file in self._files.items():
            if file.received < file.info.size_bytes:
                problem = f"is truncated: {file.received} of {file.info.size_bytes} bytes were received"
                raise _invalid_file(name, problem, "TRUNCATED_FILE")
            if file.info.sha256 and file.info.sha256.lower() != file.digest.hexdigest():
                raise _invalid_file(name, f"has sha256 {file.digest.hexdigest()}, not {file.info.sha256}", "CHECKSUM")
            file.stream.flush()


def _check_name(name: str) -> None:
    if name in REQUIRED_FILES or name in SMALL_FILES:
        return
    if name.endswith(PICKLE_SUFFIXES):
        raise _invalid_file(
            name, "may be a pickle, which can run code: turn it into safetensors with `deltamux convert`", "PICKLE"
        )
    known = ", ".join(dict.fromkeys((*REQUIRED_FILES, *SMALL_FILES)))
    raise _invalid_file(name, f"is not a file of an adapter; these are: {known}", "UNKNOWN_FILE")


def _chunk(message: pb.UploadAdapterRequest) -> pb.FileChunk:
    if message.WhichOneof("message") != "chunk":
        raise InvalidArgumentError(
            "every message after the header must be a chunk", reason="UPLOAD_PROTOCOL", metadata={"field": "chunk"}
        )
    if len(message.chunk.data) > MAX_CHUNK_BYTES:
        raise InvalidArgumentError(
            f"a chunk has {len(message.chunk.data)} bytes; at most {MAX_CHUNK_BYTES} are allowed",
            reason="UPLOAD_PROTOCOL",
            metadata={"field": "chunk.data"},
        )
    return message.chunk


class _PacedMessages:
    """Messages with a least rate; the time in which the server handles them does not count."""

    def __init__(self, messages: AsyncIterator[pb.UploadAdapterRequest], limits: UploadLimits) -> None:
        self._messages = messages
        self._limits = limits
        self._waited = 0.0
        self._received = 0
        self._overdue = 0.0  # seconds behind the least rate; an earlier faster rate does not count
        self._began = 0.0  # start of the present wait
        self._timeout: asyncio.Timeout | None = None  # of the present wait, if any
        self._cancelled = False

    def overdue(self) -> float:
        if self._timeout is None:
            return 0.0
        return self._overdue + time.monotonic() - self._began - self._limits.contended_seconds

    def cancel(self) -> None:
        self._cancelled = True
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def next(self) -> pb.UploadAdapterRequest | None:
        """Returns the next message, or None at the end; raises DeadlineExceededError if it is too late."""
        left = self._limits.idle_seconds + self._received / self._limits.min_bytes_per_second - self._waited
        self._began = time.monotonic()
        try:
            async with asyncio.timeout(0 if self._cancelled else min(self._limits.idle_seconds, left)) as self._timeout:
                message = await anext(self._messages, None)
        except TimeoutError:
            raise self._timeout_error(left) from None
        finally:
            self._timeout = None
        self._count(time.monotonic() - self._began, 0 if message is None else len(message.chunk.data))
        return message

    def _count(self, waited: float, received: int) -> None:
        self._waited += waited
        self._received += received
        self._overdue = max(0.0, self._overdue + waited - received / self._limits.min_bytes_per_second)

    def _timeout_error(self, left: float) -> DeadlineExceededError:
        idle, rate = self._limits.idle_seconds, self._limits.min_bytes_per_second
        if self._cancelled:
            return _too_slow(f"had less than {rate} bytes per second while others waited")
        if left < idle:
            received = f"{self._received} bytes in {self._waited + left:.0f} s"
            return _too_slow(f"had less than {rate} bytes per second ({received})")
        return _too_slow(f"was idle for {idle:.0f} s")


def _too_slow(problem: str) -> DeadlineExceededError:
    return DeadlineExceededError(f"the upload {problem} and was cancelled; send it again", reason="UPLOAD_TOO_SLOW")


def _invalid_file(name: str, problem: str, reason: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"file {name[:80]!r} {problem}", reason=reason, metadata={"file": name})
