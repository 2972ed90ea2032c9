"""What the server and its compiler process say to each other: plain data, one JSON object per line.

Only the server pickles anything (the base model's description): what comes out of the process that runs plugins is
never more than JSON.
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

if TYPE_CHECKING:
    from deltamux.deltas import BaseModel

MAX_TEXT = 1 << 16


@dataclass(frozen=True)
class Budgets:
    """What one adapter may need at most; see `ServeOptions`."""

    max_rank: int
    max_virtual_tokens: int
    max_bytes: int


@dataclass(frozen=True)
class Job:
    """One adapter to compile.

    Attributes:
        staged: directory of its files; the program is written there too.
        announced: the method it should be of; "" lets the files say.
        base: the base model, as `packed` gives it.
    """

    staged: Path
    announced: str
    budgets: Budgets
    base: str

    def message(self) -> dict[str, Any]:
        return {**asdict(self), "staged": str(self.staged)}

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Job:
        budgets = Budgets(**message["budgets"])
        return cls(Path(message["staged"]), message["announced"], budgets, message["base"])


@dataclass(frozen=True)
class Compiled:
    """What the compiler found out about an adapter; its program lies beside its files."""

    method: str
    rank: int
    num_virtual_tokens: int
    num_bytes: int

    @classmethod
    def of(cls, message: Any) -> Compiled:
        """Raises ValueError if the message is not what a compiler says."""
        numbers = [message.get(name) for name in ("rank", "num_virtual_tokens", "num_bytes")]
        method = message.get("method")
        if not isinstance(method, str) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"no description of a compiled adapter: {message!r:.200}")
        return cls(method, *numbers)


def packed(base: BaseModel) -> str:
    """Returns a base model's description as text; its tensors are read from their files on the other side."""
    return base64.b64encode(pickle.dumps(base)).decode()


def unpacked(base: str) -> BaseModel:
    described: BaseModel = pickle.loads(base64.b64decode(base))
    return described


def error_message(error: DeltamuxError) -> dict[str, Any]:
    """Returns an error as plain data; one of a plugin's own class crosses as the family's class that it comes from."""
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return {
        "kind": kind,
        "message": str(error.message)[:MAX_TEXT],
        "reason": str(error.reason),
        "metadata": {str(key): str(value)[:MAX_TEXT] for key, value in error.metadata.items()},
        "retry_after": error.retry_after,
    }


def error_of(message: Mapping[str, Any]) -> DeltamuxError:
    """Returns the error that `error_message` described; raises ValueError if it did not."""
    kind = getattr(errors, str(message.get("kind")), None)
    metadata = message.get("metadata")
    if not (isinstance(kind, type) and issubclass(kind, DeltamuxError) and isinstance(metadata, dict)):
        raise ValueError(f"no description of an error: {message!r:.200}")
    retry_after = message.get("retry_after")
    if retry_after is not None and not isinstance(retry_after, int | float):
        raise ValueError(f"no description of an error: {message!r:.200}")
    return kind(
        str(message.get("message")), reason=str(message.get("reason")), metadata=metadata, retry_after=retry_after
    )
