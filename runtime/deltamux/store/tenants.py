"""Tenants and their API keys."""

import hashlib
import secrets
import time

from deltamux.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from deltamux.store import rows
from deltamux.store.database import Database, is_id
from deltamux.store.records import ApiKeyRecord, TenantRecord

SECRET_PREFIX = "dmx_"


class Tenants:
    """The tenants and their API keys: random (256 bits), so that their hash needs no salt and no stretching."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant: str) -> TenantRecord:
        """Creates a tenant; raises AlreadyExistsError."""
        with self._database.transaction():
            if self._row(tenant) is not None:
                raise AlreadyExistsError(f"tenants/{tenant} exists already", metadata={"name": f"tenants/{tenant}"})
            self._database.execute("INSERT INTO tenants VALUES (?, ?)", tenant, time.time())
        return self.get(tenant)

    def get(self, tenant: str) -> TenantRecord:
        """Returns a tenant; raises NotFoundError."""
        row = self._row(tenant)
        if row is None:
            raise NotFoundError(f"tenants/{tenant} does not exist", metadata={"name": f"tenants/{tenant}"})
        return rows.tenant(row)

    def page(self, *, after: str = "", limit: int = 100) -> list[TenantRecord]:
        """Returns tenants in order of name, beginning after the name `after`."""
        sql = f"SELECT * FROM tenants WHERE {is_id('tenant')} AND tenant > ? ORDER BY tenant LIMIT ?"
        return list(map(rows.tenant, self._database.fetch_all(sql, after, limit)))

    def delete(self, tenant: str, *, empty: bool) -> None:
        """Removes a tenant and its keys, inside the caller's transaction; see `AdapterStore.delete_tenant`.

        Args:
            empty: whether it has no adapters, or the deletion is forced.
        """
        self.get(tenant)
        if not empty:
            raise FailedPreconditionError(
                f"tenants/{tenant} has adapters: delete them first, or force the deletion",
                reason="TENANT_NOT_EMPTY",
                metadata={"name": f"tenants/{tenant}"},
            )
        self._database.execute("DELETE FROM tenants WHERE tenant = ?", tenant)

    def create_key(self, tenant: str) -> tuple[ApiKeyRecord, str]:
        """Creates an API key; its secret is returned here only."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        key = secrets.token_hex(6)
        with self._database.transaction():
            self.get(tenant)
            self._database.execute("INSERT INTO api_keys VALUES (?, ?, ?, ?)", tenant, key, _hash(secret), time.time())
        row = self._database.fetch_one("SELECT * FROM api_keys WHERE tenant = ? AND key = ?", tenant, key)
        return rows.api_key(row), secret

    def keys(self, tenant: str, *, after: str = "", limit: int = 100) -> list[ApiKeyRecord]:
        """Returns a tenant's keys, without secrets, beginning after the key `after`."""
        self.get(tenant)
        sql = "SELECT * FROM api_keys WHERE tenant = ? AND key > ? ORDER BY key LIMIT ?"
        return list(map(rows.api_key, self._database.fetch_all(sql, tenant, after, limit)))

    def delete_key(self, tenant: str, key: str) -> None:
        """Revokes a key at once; raises NotFoundError."""

        def revoke() -> int:
            with self._database.transaction():
                return self._database.execute("DELETE FROM api_keys WHERE tenant = ? AND key = ?", tenant, key).rowcount

        if not self._database.with_reserve(revoke):
            name = f"tenants/{tenant}/keys/{key}"
            raise NotFoundError(f"{name} does not exist", metadata={"name": name})

    def verify(self, secret: str) -> str | None:
        """Returns the tenant that a secret belongs to, or None."""
        key = self.key_of(secret)
        return key.tenant if key else None

    def key_of(self, secret: str) -> ApiKeyRecord | None:
        """Returns the key that a secret is of, or None."""
        row = self._database.fetch_one("SELECT * FROM api_keys WHERE secret_hash = ?", _hash(secret))
        return rows.api_key(row) if row else None

    def _row(self, tenant: str) -> object | None:
        row: object | None = self._database.fetch_one("SELECT * FROM tenants WHERE tenant = ?", tenant)
        return row


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
