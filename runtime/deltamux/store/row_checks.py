"""What rows of the database may not hold, each with the SQL that finds it and the SQL that mends it."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from typing import NamedTuple

from deltamux.store.database import Database, is_id
from deltamux.store.rows import LAST_SECOND, MAX_INT32, MAX_INT64

log = logging.getLogger("deltamux.store")

MAX_LOGGED = 20


class RowFault(NamedTuple):
    """Something that is wrong with a row.

    Attributes:
        name: of the tenant, adapter or version.
        problem: in words, as what follows "its row".
    """

    name: str
    problem: str


class _Check(NamedTuple):
    """Attributes:
    table: t in the condition.
    wrong: the condition of a row that is wrong.
    mend: statements that mend the row whose rowid is their parameter; none where only the same upload does.
    """

    table: str
    wrong: str
    problem: str
    mend: tuple[str, ...]


_SAME = "{0}.tenant = {1}.tenant AND {0}.adapter = {1}.adapter"
_READY_OF_T = f"SELECT 1 FROM versions v WHERE {_SAME.format('v', 't')} AND v.state <> 'DRAINING'"
_IT = "WHERE rowid = ?1"
_LAST = f"(SELECT coalesce(max(CAST(number AS INTEGER)), 0) FROM versions v WHERE {_SAME.format('v', 'adapters')})"
_NOW = "CAST(strftime('%s', 'now') AS REAL)"
_LABELS = """CASE WHEN typeof(t.labels) = 'text' AND json_valid(t.labels)
    THEN json_type(t.labels) = 'object' AND NOT EXISTS (SELECT 1 FROM json_each(t.labels) WHERE type <> 'text')
    ELSE FALSE END"""
_DIGEST = "typeof(t.digest) = 'text' AND length(t.digest) = 64 AND t.digest NOT GLOB '*[^0-9a-f]*'"


def _unnamed(table: str) -> _Check:
    columns = ("tenant",) if table in ("tenants", "api_keys") else ("tenant", "adapter")
    wrong = f"NOT ({' AND '.join(is_id(f't.{column}') for column in columns)})"
    return _Check(table, wrong, "has a name that is not one: mending drops it", (f"DELETE FROM {table} {_IT}",))


def _time(table: str, column: str) -> _Check:
    problem = f"has no time in `{column}`"
    whole = f"typeof(t.{column}) IN ('integer', 'real') AND t.{column} BETWEEN 0 AND {LAST_SECOND}"
    return _Check(table, f"NOT ({whole})", problem, (f"UPDATE {table} SET {column} = {_NOW} {_IT}",))


def _number(column: str, high: int, mend: tuple[str, ...]) -> _Check:
    wrong = f"typeof(t.{column}) <> 'integer' OR t.{column} NOT BETWEEN 0 AND {high}"
    return _Check("versions", wrong, f"has no number in `{column}`", mend)


# What a check's mending makes wrong, or right, is looked at by a later one.
_CHECKS = (
    *map(_unnamed, ("promotions", "versions", "adapters", "api_keys", "tenants")),
    _Check(
        "versions",
        f"NOT EXISTS (SELECT 1 FROM adapters a WHERE {_SAME.format('a', 't')})",
        "is of an adapter that is not there",
        (f"INSERT OR IGNORE INTO adapters (tenant, adapter, created, updated)"
         f" SELECT tenant, adapter, {_NOW}, {_NOW} FROM versions {_IT}",),
    ),
    _Check(
        "versions",
        "NOT EXISTS (SELECT 1 FROM tenants n WHERE n.tenant = t.tenant)",
        "is of a tenant that is not there",
        (f"INSERT OR IGNORE INTO tenants SELECT tenant, {_NOW} FROM versions {_IT}",),
    ),
    _Check(
        "api_keys",
        "NOT EXISTS (SELECT 1 FROM tenants n WHERE n.tenant = t.tenant)",
        "is of a tenant that is not there: mending drops it",
        (f"DELETE FROM api_keys {_IT}",),
    ),
    _Check(
        "adapters",
        f"typeof(t.last_number) <> 'integer' OR t.last_number < {_LAST.replace('adapters', 't')}",
        "has a last number below those of its versions",
        (f"UPDATE adapters SET last_number = max(CAST(last_number AS INTEGER), {_LAST}) {_IT}",),
    ),
    _Check(
        "versions",
        "typeof(t.number) <> 'integer' OR t.number < 1",
        "has no number: mending gives it the adapter's next one",
        (f"UPDATE adapters SET last_number = last_number + 1 WHERE (tenant, adapter) ="
         f" (SELECT tenant, adapter FROM versions {_IT})",
         f"UPDATE versions SET number = (SELECT last_number FROM adapters a WHERE {_SAME.format('a', 'versions')})"
         f" {_IT}"),
    ),
    _Check(
        "versions",
        "t.state NOT IN ('READY', 'DRAINING')",
        "has a state that is not one",
        (f"UPDATE versions SET state = 'READY' {_IT}",),
    ),
    _Check(
        "versions",
        f"NOT {_LABELS}",
        "has labels that are not a JSON object of texts: mending drops them",
        (f"UPDATE versions SET labels = '{{}}' {_IT}",),
    ),
    _Check(
        "versions",
        "typeof(t.method) <> 'text'",
        "has no method's name",
        (f"UPDATE versions SET method = '' {_IT}",),
    ),
    _Check("versions", f"NOT ({_DIGEST})", "has no digest: delete the version, or its adapter", ()),
    _number("rank", MAX_INT32, (f"UPDATE versions SET rank = 0 {_IT}",)),
    _number("num_virtual_tokens", MAX_INT32, ()),
    _number("num_bytes", MAX_INT64, (f"UPDATE versions SET num_bytes = 0 {_IT}",)),
    *(_time(table, "created") for table in ("tenants", "api_keys", "adapters", "versions")),
    _time("adapters", "updated"),
    _Check(
        "promotions",
        f"NOT EXISTS ({_READY_OF_T} AND v.number = t.number)",
        "says that a version serves, or did, that is not there: mending drops it",
        (f"DELETE FROM promotions {_IT}",),
    ),
    _Check(
        "adapters",
        f"NOT t.deleted AND NOT EXISTS (SELECT 1 FROM promotions p WHERE {_SAME.format('p', 't')})"
        f" AND EXISTS ({_READY_OF_T})",
        "has no version that serves: mending promotes its last one",
        (f"INSERT INTO promotions (tenant, adapter, number) SELECT v.tenant, v.adapter, max(v.number)"
         f" FROM versions v JOIN adapters t ON {_SAME.format('v', 't')} WHERE t.rowid = ?1 AND v.state = 'READY'",),
    ),
    _Check(
        "adapters",
        f"NOT t.deleted AND NOT EXISTS ({_READY_OF_T})",
        "has no version: mending drops it",
        (f"UPDATE adapters SET deleted = 1, pinned = 0, canary_number = NULL, canary_percent = NULL {_IT}",),
    ),
    _Check(
        "adapters",
        "(t.canary_number IS NOT NULL OR t.canary_percent IS NOT NULL) AND NOT"
        " (coalesce(typeof(t.canary_percent) = 'integer' AND t.canary_percent BETWEEN 1 AND 99, FALSE)"
        f" AND EXISTS ({_READY_OF_T} AND v.number = t.canary_number))",
        "has a canary without a share of 1 to 99 percent, or without a version: mending ends it",
        (f"UPDATE adapters SET canary_number = NULL, canary_percent = NULL {_IT}",),
    ),
    _Check(
        "adapters",
        "t.pinned NOT IN (0, 1)",
        "says neither that it is pinned nor that it is not: mending unpins it",
        (f"UPDATE adapters SET pinned = 0 {_IT}",),
    ),
)  # fmt: skip
_NAMES = {
    "tenants": "'tenants/' || t.tenant",
    "api_keys": "'tenants/' || t.tenant || '/keys/' || t.key",
    "adapters": "'tenants/' || t.tenant || '/adapters/' || t.adapter",
    "promotions": "'tenants/' || t.tenant || '/adapters/' || t.adapter",
    "versions": "'tenants/' || t.tenant || '/adapters/' || t.adapter || '/versions/' || t.number",
}


def row_faults(connection: sqlite3.Connection) -> Iterator[RowFault]:
    """Yields what is wrong with the rows of a database, whose connection `rows.prepare` has prepared."""
    for check in _CHECKS:
        for _, name in connection.execute(_query(check)):
            yield RowFault(str(name)[:200], check.problem)


def _query(check: _Check) -> str:
    return f"SELECT t.rowid, {_NAMES[check.table]} FROM {check.table} t WHERE {check.wrong} ORDER BY t.rowid"


class RowChecks:
    """The checks of an open store's rows.

    Args:
        changed: called after rows were mended.
    """

    def __init__(self, database: Database, changed: Callable[[], None]) -> None:
        self._database = database
        self._changed = changed

    def tell(self) -> None:
        """Logs what is wrong: nothing of it keeps the store from opening."""
        faults = self._database.reading(lambda connection: list(row_faults(connection)))
        for fault in faults[:MAX_LOGGED]:
            log.error("the row of %s %s", fault.name, fault.problem)
        if faults:
            log.error("damaged rows in the store: %d; `deltamux store check --repair` mends them", len(faults))

    def mend(self) -> list[RowFault]:
        """Mends what can be, in one transaction; returns what was wrong with each row that was mended."""
        mended: list[RowFault] = []
        with self._database.transaction():
            for check in _CHECKS:
                for row, name in self._database.all(_query(check)) if check.mend else ():
                    for statement in check.mend:
                        self._database.run(statement, row)
                    mended.append(RowFault(str(name)[:200], check.problem))
        self._changed()
        return mended
