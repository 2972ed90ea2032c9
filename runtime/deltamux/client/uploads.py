"""The upload of an adapter's directory."""

import hashlib
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from deltamux.adapter_files import REQUIRED_FILES, missing
from deltamux.client.calls import Call, checked_values, read_version
from deltamux.client.results import AdapterVersion
from deltamux.errors import InvalidAdapterError
from deltamux.v1 import adapters_pb2 as pb

OPTIONAL_FILES = ("README.md",)
CHUNK_BYTES = 512 * 1024

Progress = Callable[[int, int], None]
"""Called with the bytes sent and all bytes."""


def upload_adapter(
    name: str,
    path: str | Path,
    *,
    method: str = "",
    promote: bool | None = None,
    labels: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> Call[AdapterVersion]:
    """Uploads an adapter's directory as a new version; the same content again is the same version.

    Args:
        name: ``tenants/{tenant}/adapters/{adapter}``.
        path: directory with adapter_config.json and adapter_model.safetensors.
        promote: True serves the version at once; None does so for an adapter's first version only.
        progress: called with the bytes sent and all bytes.
    """
    messages = partial(upload_messages, name, path, method=method, promote=promote, labels=labels, progress=progress)
    call = Call("Adapters.UploadAdapter", messages(), read_version, timeout=timeout)
    return replace(call, new_request=messages, retry_refused=True)


def upload_messages(
    adapter: str,
    directory: str | Path,
    *,
    method: str = "",
    promote: bool | None = None,
    labels: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Iterator[pb.UploadAdapterRequest]:
    """Yields the header and the files in chunks, of which one is in memory at a time.

    Raises:
        InvalidAdapterError: the directory is not an adapter; raised before anything is sent.
        InvalidArgumentError: a name or label cannot be sent.
    """
    files = [_file(Path(directory) / name) for name in _present(Path(directory))]
    with checked_values():
        header = pb.UploadHeader(adapter=adapter, method=method, labels=labels or {}, promote=promote)
    header.files.extend(_info(file) for file in files)
    return _messages(header, files, progress or (lambda sent, total: None))


def _messages(header: pb.UploadHeader, files: list[Path], progress: Progress) -> Iterator[pb.UploadAdapterRequest]:
    yield pb.UploadAdapterRequest(header=header)
    sent, total = 0, sum(info.size_bytes for info in header.files)
    for file in files:
        with file.open("rb") as stream:
            while data := stream.read(CHUNK_BYTES):
                yield pb.UploadAdapterRequest(chunk=pb.FileChunk(path=file.name, data=data))
                sent += len(data)
                progress(sent, total)


def _present(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise InvalidAdapterError(f"{directory} is not a directory; give the one with {REQUIRED_FILES[0]}")
    return [*REQUIRED_FILES, *(name for name in OPTIONAL_FILES if (directory / name).is_file())]


def _file(path: Path) -> Path:
    try:
        mode = path.stat().st_mode
    except OSError:
        raise InvalidAdapterError(
            missing(path.parent, path.name), reason="MISSING_FILE", metadata={"file": path.name}
        ) from None
    if not stat.S_ISREG(mode):
        raise InvalidAdapterError(f"{path} is not a regular file", metadata={"file": path.name})
    return path


def _info(path: Path) -> pb.FileInfo:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return pb.FileInfo(path=path.name, size_bytes=path.stat().st_size, sha256=digest)
