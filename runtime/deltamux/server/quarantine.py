"""The quarantine: everything that could be wrong with an upload is found before a version of it can be routed.

Order matters: sizes and the safetensors header first, by their bytes, here. Only then does the compiler's process read
the files: the config against the method, the tensors against the base, the values, and the budgets. What it compiled is
committed here.
"""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deltamux.deltas import BaseModel
from deltamux.deltas.checkpoint import TENSORS_FILE
from deltamux.errors import InvalidAdapterError
from deltamux.server.compile_job import Budgets, Job, packed
from deltamux.server.compiler import Compiler
from deltamux.store import AdapterKey, AdapterStore, CompiledAdapter, VersionRecord, content_digest

T = TypeVar("T")
MAX_HEADER_BYTES = 64 << 20
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


@dataclass(frozen=True)
class Upload:
    """What the uploader says of an upload.

    Attributes:
        method: the method it should be of; "" lets the files say.
        expected_digest: the digest it should have; "" for none.
        promote: see `AdapterStore.commit`.
    """

    key: AdapterKey
    method: str = ""
    expected_digest: str = ""
    promote: bool | None = None
    labels: dict[str, str] | None = None


class Quarantine:
    """Checks uploads against one base model, and commits what passes.

    Args:
        threads: run what touches the disk.
    """

    def __init__(
        self,
        store: AdapterStore,
        compiler: Compiler,
        base: BaseModel,
        budgets: Budgets,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._store = store
        self._compiler = compiler
        self._base = packed(base)
        self._budgets = budgets
        self._threads = threads

    async def admit(self, staged: Path, upload: Upload) -> VersionRecord:
        """Checks, compiles and commits a staged upload.

        Raises:
            InvalidAdapterError, InvalidConfigError, UnknownMethodError: the files are wrong, on any base.
            BaseMismatchError: they were made for another base.
            BudgetExceededError: they need more than the server gives one adapter.
            PluginError: their method's plugin failed, hung or crashed.
        """
        digest = await self._run(lambda: _digest(staged, upload.expected_digest))
        job = Job(staged, upload.method, self._budgets, self._base)
        found = await self._compiler.compile(job)
        compiled = CompiledAdapter(digest, found.method, found.rank, found.num_virtual_tokens, found.num_bytes)
        return await self._run(
            lambda: self._store.commit(staged, upload.key, compiled, promote=upload.promote, labels=upload.labels)
        )

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _digest(staged: Path, expected: str) -> str:
    check_header(staged / TENSORS_FILE)
    digest = content_digest(staged)
    if expected and expected != digest:
        raise InvalidAdapterError(
            f"the files have digest {digest}, not {expected} as announced", reason="DIGEST_MISMATCH"
        )
    return digest


def check_header(path: Path) -> None:
    """Checks a safetensors file by its bytes: nothing is allocated for what its header merely claims.

    Raises:
        InvalidAdapterError: a pickle, a truncated file, a header that is no JSON object, or tensors that overlap, leave
            gaps or lie outside the file.
    """
    try:
        status = path.lstat()
    except OSError:
        raise _refused(f"{path.name} is missing", "MISSING_FILE", path) from None
    if not stat.S_ISREG(status.st_mode):
        raise _refused(f"{path.name} is not a regular file", "INVALID_FILE", path)
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(PICKLE_MAGIC):
            raise _refused(f"{path.name} is a pickle, which is never read: save it as safetensors", "PICKLE", path)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(status.st_size - 8, MAX_HEADER_BYTES):
            problem = f"{path.name} claims a header of {length} bytes, but has {status.st_size} bytes in all"
            raise _refused(f"{problem}: it is truncated or no safetensors file", "DAMAGED_FILE", path)
        header = file.read(length)
    _check_tensors(_parse(header, path), status.st_size - 8 - length, path)


def _parse(header: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _refused(f"the header of {path.name} is no JSON: {error}", "DAMAGED_FILE", path) from error
    if not isinstance(values, dict):
        raise _refused(f"the header of {path.name} is no JSON object", "DAMAGED_FILE", path)
    values.pop("__metadata__", None)
    return values


def _check_tensors(header: dict[str, Any], num_bytes: int, path: Path) -> None:
    spans = sorted(_span(name, entry, path) for name, entry in header.items())
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            raise _refused(
                f"tensor {name!r} of {path.name} overlaps another or leaves a gap", "DAMAGED_FILE", path, name
            )
        expected = end
    if expected != num_bytes:
        problem = f"the header of {path.name} claims {expected} bytes of tensors, but the file holds {num_bytes}"
        raise _refused(f"{problem}: it is truncated or damaged", "TRUNCATED_FILE", path)


def _span(name: str, entry: Any, path: Path) -> tuple[int, int, str]:
    try:
        begin, end = entry["data_offsets"]
        size = ITEM_BYTES[entry["dtype"]]
        for dimension in entry["shape"]:
            size *= dimension
        sound = begin >= 0 and end - begin == size and all(isinstance(n, int) and n >= 0 for n in entry["shape"])
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        problem = f"tensor {str(name)[:80]!r} of {path.name} has a shape, dtype or place that do not fit each other"
        raise _refused(problem, "DAMAGED_FILE", path, name)
    return begin, end, name


def _refused(problem: str, reason: str, path: Path, tensor: str = "") -> InvalidAdapterError:
    metadata = {"file": path.name} | ({"tensor": tensor} if tensor else {})
    return InvalidAdapterError(problem, reason=reason, metadata=metadata)
