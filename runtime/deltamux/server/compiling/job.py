"""The messages between the server and its compiler process: one JSON object per line.

Only the server pickles anything (the base model's description): messages from the process that runs plugins are plain
JSON.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamux import errors
from deltamux.errors import DeltamuxError
from deltamux.store import CompiledAdapter

if TYPE_CHECKING:
    from deltamux.deltas import BaseModel, BaseSupport

MAX_TEXT = 1 << 16


@dataclass(frozen=True)
class Budgets:
    """The most that one adapter may need; see `ServeOptions`."""

    max_rank: int
    max_virtual_tokens: int
    max_bytes: int


@dataclass(frozen=True)
class Job:
    """One adapter to compile.

    Attributes:
        staged: directory of its files; the program is written there too.
        expected_method: the declared method; "" to recognise it by the files.
        base: the base model, as text of `encode_base`.
    """

    staged: Path
    expected_method: str
    budgets: Budgets
    base: str

    def message(self) -> dict[str, Any]:
        return {**asdict(self), "staged": str(self.staged)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Job:
        budgets = Budgets(**message["budgets"])
        return cls(Path(message["staged"]), message["expected_method"], budgets, message["base"])


@dataclass(frozen=True)
class Compiled:
    """The result of a job; the program's file is in the job's directory."""

    method: str
    rank: int
    num_virtual_tokens: int
    num_bytes: int

    @classmethod
    def from_message(cls, message: Any) -> Compiled:
        """Returns the result in a message; raises ValueError if it holds none."""
        numbers = [message.get(name) for name in ("rank", "num_virtual_tokens", "num_bytes")]
        method = message.get("method")
        if not isinstance(method, str) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"not a description of a compiled adapter: {message!r:.200}")
        return cls(method, *numbers)

    def record(self, digest: str, base_fingerprint: str) -> CompiledAdapter:
        """Returns the store's record of the adapter."""
        return CompiledAdapter(
            digest, self.method, self.rank, self.num_virtual_tokens, self.num_bytes, base_fingerprint
        )


def encode_base(base: BaseModel, support: BaseSupport | None = None) -> str:
    """Returns a base model's description as text, its tensors staying in their files, and what an engine takes on it.

    Args:
        support: None where no engine serves the base.
    """
    return base64.b64encode(pickle.dumps((base, support))).decode()


def decode_base(base: str) -> tuple[BaseModel, BaseSupport | None]:
    described: tuple[BaseModel, BaseSupport | None] = pickle.loads(base64.b64decode(base))
    return described


def encode_error(error: DeltamuxError) -> dict[str, Any]:
    """Returns an error as plain data; one of a plugin's own class as its nearest base class in `deltamux.errors`."""
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return {
        "kind": kind,
        "message": str(error.message)[:MAX_TEXT],
        "reason": str(error.reason),
        "metadata": {str(key): str(value)[:MAX_TEXT] for key, value in error.metadata.items()},
        "retry_after": error.retry_after,
    }


def decode_error(message: Mapping[str, Any]) -> DeltamuxError:
    """Returns the error of an `encode_error` message; raises ValueError if it is not one."""
    kind = getattr(errors, str(message.get("kind")), None)
    metadata = message.get("metadata")
    if not (isinstance(kind, type) and issubclass(kind, DeltamuxError) and isinstance(metadata, dict)):
        raise ValueError(f"not a description of an error: {message!r:.200}")
    retry_after = message.get("retry_after")
    if retry_after is not None and not isinstance(retry_after, int | float):
        raise ValueError(f"not a description of an error: {message!r:.200}")
    return kind(
        str(message.get("message")), reason=str(message.get("reason")), metadata=metadata, retry_after=retry_after
    )
