"""The errors that deltamux raises: one tree of classes, each with its gRPC status.

``status`` is the name of a `grpc.StatusCode` member, so that this module does not import gRPC; an interceptor of the
server maps an error to a `google.rpc.Status`, and the client maps that to a `DeltamuxError` again. ``reason`` is a
stable upper-case word for programs; the message is for people and has the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import grpc


def listed(names: Iterable[object], most: int = 6, chars: int = 160) -> str:
    """Returns names for a message: the first few, each cut to so many characters, and how many more there are."""
    known = [str(name)[:chars] for name in names]
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


class DeltamuxError(Exception):
    """The base class.

    Args:
        message: what was wrong, where, and what to do about it.
        reason: overrides the class's `default_reason`.
        metadata: names and values that the error concerns (tensor, field, limit ...), as strings.
        retry_after: seconds after which the request may be sent again; a RetryInfo detail in the status.
    """

    status: ClassVar[str] = "INTERNAL"
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        import grpc

        return grpc.StatusCode[self.status]


class InvalidArgumentError(DeltamuxError):
    """The request is invalid in every state of the server."""

    status = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"


class InvalidAdapterError(InvalidArgumentError):
    """An adapter's files are invalid; the metadata name the file, tensor or field."""

    default_reason = "INVALID_ADAPTER"


class InvalidConfigError(InvalidArgumentError):
    """A method's configuration has an unknown key or a value out of range."""

    default_reason = "INVALID_CONFIG"


class UnknownMethodError(InvalidArgumentError):
    """No installed plugin provides the method; the message lists the installed ones."""

    default_reason = "UNKNOWN_METHOD"


class FailedPreconditionError(DeltamuxError):
    """The request is valid, but not for the present base model or state."""

    status = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class BaseMismatchError(FailedPreconditionError):
    """The adapter was made for another base model: shapes, sites or fingerprint differ."""

    default_reason = "BASE_MISMATCH"


class QuantisedBaseError(FailedPreconditionError):
    """The adapter computes with a weight that the base stores quantised, and whose values cannot be read."""

    default_reason = "BASE_QUANTISED"


class BudgetExceededError(FailedPreconditionError):
    """The adapter exceeds the server's limits (rank, virtual tokens, bytes)."""

    default_reason = "BUDGET_EXCEEDED"


class NotMergeableError(FailedPreconditionError):
    """The method cannot be merged into plain weights; the message has the reason."""

    default_reason = "NOT_MERGEABLE"


class PluginError(FailedPreconditionError):
    """A plugin violated its contract; the message names the plugin, the hook and the problem."""

    default_reason = "PLUGIN_ERROR"


class PluginTimeoutError(PluginError):
    """A plugin exceeded its time for an adapter, and its process was killed."""

    default_reason = "PLUGIN_TIMEOUT"


class PluginCrashedError(PluginError):
    """A plugin crashed the compiler process; the server is not affected."""

    default_reason = "PLUGIN_CRASHED"


class NotFoundError(DeltamuxError):
    """The resource does not exist, or belongs to another tenant."""

    status = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class AlreadyExistsError(DeltamuxError):
    status = "ALREADY_EXISTS"
    default_reason = "ALREADY_EXISTS"


class UnauthenticatedError(DeltamuxError):
    status = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(DeltamuxError):
    status = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


class ResourceExhaustedError(DeltamuxError):
    """A quota or limit is reached."""

    status = "RESOURCE_EXHAUSTED"
    default_reason = "QUOTA_EXCEEDED"


class UnavailableError(DeltamuxError):
    """The engine or the server cannot serve at the moment."""

    status = "UNAVAILABLE"
    default_reason = "ENGINE_UNAVAILABLE"


class DataLossError(DeltamuxError):
    """Stored data is missing or damaged; the message names it and the repair."""

    status = "DATA_LOSS"
    default_reason = "DATA_LOSS"


class AbortedError(DeltamuxError):
    """The call conflicts with a concurrent change; read the present state and try again."""

    status = "ABORTED"
    default_reason = "CONFLICT"


class CancelledError(DeltamuxError):
    status = "CANCELLED"
    default_reason = "CANCELLED"


class DeadlineExceededError(DeltamuxError):
    status = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"
