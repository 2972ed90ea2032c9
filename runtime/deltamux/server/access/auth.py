"""Who calls: with ``--auth keys`` the key in the call's metadata says it, with ``--auth none`` everybody is trusted."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from deltamux.errors import FailedPreconditionError, UnauthenticatedError
from deltamux.server.access.caller import ADMINISTRATOR, CURRENT, Caller
from deltamux.server.transport.interceptors import Around, Context
from deltamux.server.transport.pacing import OPEN_SERVICES
from deltamux.store import AdapterStore

LONGEST_KEY = 4096
"""Characters of an administrator's key: more do not fit into a call's metadata."""


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
    """Returns the administrator's key, making the file, readable by its owner alone, where there is none.

    Raises:
        FailedPreconditionError: the file cannot be read or made, or does not hold one key (ADMIN_KEY).
    """
    try:
        if not file.exists():
            _write_key(file, f"dmx_admin_{secrets.token_urlsafe(32)}\n")
        key = file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise _admin_key(file, f"cannot be read or written: {error.strerror or error}") from error
    except ValueError as error:
        raise _admin_key(file, "is not text in ASCII") from error
    if not 1 <= len(key) <= LONGEST_KEY or not all("!" <= character <= "~" for character in key):
        raise _admin_key(file, f"does not hold one key of 1 to {LONGEST_KEY} visible characters without spaces")
    return key


def _write_key(file: Path, key: str) -> None:
    """Makes the file whole at once: a crash leaves none, and not an empty one."""
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(key)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.rename(file)
    finally:
        fresh.unlink(missing_ok=True)


def _admin_key(file: Path, problem: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the administrator's key file {file} {problem}: mend it, or remove it, and a new key is written",
        reason="ADMIN_KEY",
        metadata={"file": str(file)},
    )


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
