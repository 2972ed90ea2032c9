"""Authentication: by the key in a call's metadata with ``--auth keys``, none with ``--auth none``."""

import hashlib
import hmac
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from deltamux.errors import FailedPreconditionError, UnauthenticatedError
from deltamux.server.access.caller import ADMINISTRATOR, CURRENT, Caller
from deltamux.server.transport.interceptors import Context, RpcContextManager
from deltamux.server.transport.pacing import OPEN_SERVICES
from deltamux.store import AdapterStore

MAX_KEY_CHARS = 4096
"""Longest key of an administrator: more do not fit into a call's metadata."""


def without_authentication() -> RpcContextManager:
    """Returns a context manager that makes every caller an administrator."""

    @asynccontextmanager
    async def around(method: str, context: Context) -> AsyncIterator[None]:
        CURRENT.set(ADMINISTRATOR)
        yield

    return around


def key_authentication(store: AdapterStore, admin_key: str) -> RpcContextManager:
    """Returns a context manager that identifies the caller by ``authorization: Bearer KEY`` or ``x-api-key: KEY``."""

    @asynccontextmanager
    async def around(method: str, context: Context) -> AsyncIterator[None]:
        if not method.startswith(OPEN_SERVICES):
            CURRENT.set(_caller(_api_key(context), store, admin_key))
        yield

    return around


def load_admin_key(file: Path) -> str:
    """Returns the administrator's key; a missing file is written, readable by its owner only.

    Raises:
        FailedPreconditionError: the file cannot be read or made, or does not hold one key (ADMIN_KEY).
    """
    try:
        if not file.exists():
            _write_key(file, f"dmx_admin_{secrets.token_urlsafe(32)}\n")
        key = file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise _admin_key_error(file, f"cannot be read or written: {error.strerror or error}") from error
    except ValueError as error:
        raise _admin_key_error(file, "is not text in ASCII") from error
    if not 1 <= len(key) <= MAX_KEY_CHARS or not all("!" <= character <= "~" for character in key):
        raise _admin_key_error(file, f"does not hold one key of 1 to {MAX_KEY_CHARS} visible characters without spaces")
    return key


def _write_key(file: Path, key: str) -> None:
    """Writes the file atomically."""
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


def _admin_key_error(file: Path, problem: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the administrator's key file {file} {problem}: repair it, or remove it to have a new key written",
        reason="ADMIN_KEY",
        metadata={"file": str(file)},
    )


def _api_key(context: Context) -> str:
    """Returns a call's API key, or "" if it has none; raises UnauthenticatedError if it has several."""
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


def _caller(api_key: str, store: AdapterStore, admin: str) -> Caller:
    if not api_key:
        raise UnauthenticatedError(
            "this server requires an API key: send it as metadata `authorization: Bearer KEY`", reason="KEY_MISSING"
        )
    if hmac.compare_digest(hashlib.sha256(api_key.encode()).digest(), hashlib.sha256(admin.encode()).digest()):
        return ADMINISTRATOR
    key = store.tenants.key_of(api_key)
    if key is None:
        raise unknown_key()
    return Caller(key.tenant, key.key)


def unknown_key() -> UnauthenticatedError:
    return UnauthenticatedError("the API key is unknown or was revoked", reason="KEY_UNKNOWN")
