"""Who calls: with ``--auth keys`` the key in the call's metadata says it, with ``--auth none`` everybody is trusted."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from deltamux.errors import UnauthenticatedError
from deltamux.server.caller import ADMINISTRATOR, CURRENT, Caller
from deltamux.server.interceptors import Around, Context
from deltamux.store import AdapterStore

OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""Load balancers look at the health without a key."""


def everybody_is_administrator() -> Around:
    @asynccontextmanager
    async def around(method: str, context: Context) -> AsyncIterator[None]:
        CURRENT.set(ADMINISTRATOR)
        yield

    return around


def key_decides(store: AdapterStore, admin_key: str) -> Around:
    """Returns what identifies the caller by ``authorization: Bearer KEY`` or ``x-api-key: KEY``."""

    @asynccontextmanager
    async def around(method: str, context: Context) -> AsyncIterator[None]:
        if not method.startswith(OPEN_SERVICES):
            CURRENT.set(_caller(_presented(context), store, admin_key))
        yield

    return around


def admin_key(file: Path) -> str:
    """Returns the administrator's key, making the file, readable by its owner alone, where there is none."""
    if not file.exists():
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(f"dmx_admin_{secrets.token_urlsafe(32)}\n")
    return file.read_text(encoding="utf-8").strip()


def _presented(context: Context) -> str:
    """Returns the key that a call presents, or ""; raises UnauthenticatedError if it is not one key in one place."""
    values = [
        (key, value if isinstance(value, str) else value.decode("latin-1"))
        for key, value in context.invocation_metadata() or ()
        if key in ("authorization", "x-api-key")
    ]
    if not values:
        return ""
    if len(values) > 1:
        raise UnauthenticatedError(
            f"the call has {len(values)} credentials: send one, as authorization or as x-api-key",
            reason="KEY_AMBIGUOUS",
        )
    key, value = values[0]
    if key == "x-api-key":
        return value.strip()
    scheme, _, credentials = value.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise UnauthenticatedError(
            "the authorization's scheme is not Bearer: send `authorization: Bearer KEY`", reason="KEY_SCHEME"
        )
    return credentials.strip()


def _caller(presented: str, store: AdapterStore, admin: str) -> Caller:
    if not presented:
        raise UnauthenticatedError(
            "this server needs an API key: send it as metadata `authorization: Bearer KEY`", reason="KEY_MISSING"
        )
    if hmac.compare_digest(hashlib.sha256(presented.encode()).digest(), hashlib.sha256(admin.encode()).digest()):
        return ADMINISTRATOR
    tenant = store.tenants.verify(presented)
    if tenant is None:
        raise UnauthenticatedError("the API key is unknown or was revoked", reason="KEY_UNKNOWN")
    return Caller(tenant)
