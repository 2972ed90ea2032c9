"""Every error deltamux raises on purpose: one tree, and each class owns its gRPC status.

``status`` is the name of a `grpc.StatusCode` member, so that this module needs no gRPC; one interceptor of the server
turns an error into a `google.rpc.Status` and the client turns that back into a `DeltamuxError`.
``reason`` is a stable upper-case word that programs may compare; the message is for people and says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import grpc


class DeltamuxError(Exception):
    """Base of the family.

    Args:
        message: what was wrong, where, and what to do about it.
        reason: overrides the class's stable word where one status has several reasons.
        metadata: the offending names and values (tensor, field, limit ...), as strings.
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
    """The request is wrong whatever the state of the server."""

    status = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"


class InvalidAdapterError(InvalidArgumentError):
    """An adapter's files are broken: the metadata name the file, tensor or field."""

    default_reason = "INVALID_ADAPTER"


class InvalidConfigError(InvalidArgumentError):
    """A method's configuration has an unknown key or a value out of range."""

    default_reason = "INVALID_CONFIG"


class UnknownMethodError(InvalidArgumentError):
    """No installed plugin provides the method; the message lists those that are known."""

    default_reason = "UNKNOWN_METHOD"


class FailedPreconditionError(DeltamuxError):
    """The request is well-formed but does not fit the present base model or state."""

    status = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class BaseMismatchError(FailedPreconditionError):
    """The adapter was made for another base model: shapes, sites or fingerprint differ."""

    default_reason = "BASE_MISMATCH"


class BudgetExceededError(FailedPreconditionError):
    """The adapter needs more (rank, virtual tokens, bytes) than the server was started with."""

    default_reason = "BUDGET_EXCEEDED"


class NotMergeableError(FailedPreconditionError):
    """The method cannot be merged into plain weights; the message has the reason."""

    default_reason = "NOT_MERGEABLE"


class PluginError(FailedPreconditionError):
    """A plugin broke its contract: the message names the plugin, the hook and what it returned."""

    default_reason = "PLUGIN_ERROR"


class PluginTimeoutError(PluginError):
    """A plugin took longer over an adapter than it may; what it was doing was ended."""

    default_reason = "PLUGIN_TIMEOUT"


class PluginCrashedError(PluginError):
    """A plugin took the process along that compiled an adapter with it; the server serves on."""

    default_reason = "PLUGIN_CRASHED"


class NotFoundError(DeltamuxError):
    """Unknown to the caller: it does not exist, or belongs to another tenant."""

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
    """The engine or the server is not able to serve now."""

    status = "UNAVAILABLE"
    default_reason = "ENGINE_UNAVAILABLE"


class DataLossError(DeltamuxError):
    """Stored data is missing or is not what was stored; the message names it and says how to repair it."""

    status = "DATA_LOSS"
    default_reason = "DATA_LOSS"


class AbortedError(DeltamuxError):
    """A concurrent change won; read the present state and try again."""

    status = "ABORTED"
    default_reason = "CONFLICT"


class CancelledError(DeltamuxError):
    status = "CANCELLED"
    default_reason = "CANCELLED"


class DeadlineExceededError(DeltamuxError):
    status = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"
