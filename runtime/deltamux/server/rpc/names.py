"""Resource names: ``tenants/{tenant}/adapters/{adapter}/versions/{version}`` and its prefixes."""

import re
from typing import NamedTuple

from deltamux.errors import InvalidArgumentError
from deltamux.store import AdapterKey, VersionKey
from deltamux.store.records import ID

ID_RULE = "1 to 63 lower-case letters, digits, '.', '_' and '-', beginning and ending with a letter or digit"
_ID_PATTERN = re.compile(ID)
_TENANT = re.compile(rf"tenants/(?P<tenant>{ID})")
_ADAPTER = re.compile(rf"{_TENANT.pattern}/adapters/(?P<adapter>{ID})")
_VERSION = re.compile(rf"{_ADAPTER.pattern}/versions/(?P<version>[1-9][0-9]{{0,17}})")
_KEY = re.compile(rf"{_TENANT.pattern}/keys/(?P<key>{ID})")


class KeyName(NamedTuple):
    tenant: str
    key: str

    def __str__(self) -> str:
        return f"tenants/{self.tenant}/keys/{self.key}"


def is_id(value: str) -> bool:
    return _ID_PATTERN.fullmatch(value) is not None


def check_id(value: str, field: str) -> str:
    """Returns the id; raises InvalidArgumentError naming the request's field if it is not one."""
    if not is_id(value):
        raise InvalidArgumentError(
            f"{field} {value[:80]!r} is not an id: an id is {ID_RULE}", reason="INVALID_NAME", metadata={"field": field}
        )
    return value


def parse_tenant(name: str, field: str = "name") -> str:
    """Returns the tenant's id; all parsers raise InvalidArgumentError naming the request's field."""
    return _match(_TENANT, name, field, "tenants/{tenant}")["tenant"]


def parse_adapter(name: str, field: str = "name") -> AdapterKey:
    found = _match(_ADAPTER, name, field, "tenants/{tenant}/adapters/{adapter}")
    return AdapterKey(found["tenant"], found["adapter"])


def parse_version(name: str, field: str = "name") -> VersionKey:
    found = _match(_VERSION, name, field, "tenants/{tenant}/adapters/{adapter}/versions/{version}")
    return VersionKey(found["tenant"], found["adapter"], int(found["version"]))


def parse_adapter_or_version(name: str, field: str) -> AdapterKey | VersionKey:
    return parse_version(name, field) if "/versions/" in name else parse_adapter(name, field)


def parse_key(name: str, field: str = "name") -> KeyName:
    found = _match(_KEY, name, field, "tenants/{tenant}/keys/{key}")
    return KeyName(found["tenant"], found["key"])


def _match(pattern: re.Pattern[str], name: str, field: str, form: str) -> re.Match[str]:
    found = pattern.fullmatch(name)
    if found is None:
        raise InvalidArgumentError(
            f"{field} {name[:200]!r} is not a resource name of the form {form}, where an id is {ID_RULE}",
            reason="INVALID_NAME",
            metadata={"field": field},
        )
    return found
