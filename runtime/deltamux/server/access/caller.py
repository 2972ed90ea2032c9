"""The caller of an RPC and its permissions: a tenant's own resources, or an administrator's all."""

from contextvars import ContextVar
from dataclasses import dataclass

from deltamux.errors import NotFoundError, PermissionDeniedError


@dataclass(frozen=True)
class Caller:
    """An authenticated caller.

    Attributes:
        tenant: the tenant whose key was used; None for an administrator.
        key: the id of that key.
    """

    tenant: str | None
    key: str = ""

    @property
    def is_administrator(self) -> bool:
        return self.tenant is None

    def check_may_see(self, tenant: str, name: str) -> None:
        """Raises NotFoundError for another tenant's resource, the same as for one that does not exist."""
        if self.tenant not in (None, tenant):
            raise not_found(name)

    def check_administrator(self) -> None:
        """Raises PermissionDeniedError for a tenant's key."""
        if not self.is_administrator:
            raise PermissionDeniedError(
                "this RPC requires the administrator's key, not a tenant's", reason="ADMINISTRATOR_REQUIRED"
            )


ADMINISTRATOR = Caller(tenant=None)
CURRENT: ContextVar[Caller] = ContextVar("deltamux_caller")
"""The caller of this task's RPC."""


def current_caller() -> Caller:
    return CURRENT.get()


def not_found(name: str) -> NotFoundError:
    return NotFoundError(f"{name} does not exist, or belongs to another tenant", metadata={"name": name})
