"""Checks of the database's rows: each with the SQL that finds a damaged row and the SQL that repairs it."""

import logging
import sqlite3
from collections.abc import Callable, Iterator
from typing import NamedTuple

from deltamux.store.database import Database, is_id
from deltamux.store.rows import LAST_SECOND, MAX_INT32, MAX_INT64

log = logging.getLogger("deltamux.store")

MAX_LOGGED = 20


class RowFault(NamedTuple):
    """One problem of a row.

    Attributes:
        name: of the tenant, adapter or version.
        problem: as a sentence whose subject is the row.
    """

    name: str
    problem: str


class _Check(NamedTuple):
    """One check.

    Attributes:
        table: t in the condition.
        wrong: the condition of a damaged row.
        repair: statements that repair the row whose rowid is their parameter; none if only a new upload can.
    """

    table: str
    wrong: str
    problem: str
    repair: tuple[str, ...]


_SAME_KEY = "{0}.tenant = {1}.tenant AND {0}.adapter = {1}.adapter"
_ACTIVE_VERSION = f"SELECT 1 FROM versions v WHERE {_SAME_KEY.format('v', 't')} AND v.state <> 'DRAINING'"
_BY_ROWID = "WHERE rowid = ?1"
_LAST_NUMBER = (
    f"(SELECT coalesce(max(CAST(number AS INTEGER)), 0) FROM versions v WHERE {_SAME_KEY.format('v', 'adapters')})"
)
_NOW = "CAST(strftime('%s', 'now') AS REAL)"
_LABELS = """CASE WHEN typeof(t.labels) = 'text' AND json_valid(t.labels)
    THEN json_type(t.labels) = 'object' AND NOT EXISTS (SELECT 1 FROM json_each(t.labels) WHERE type <> 'text')
    ELSE FALSE END"""
_DIGEST = "typeof(t.digest) = 'text' AND length(t.digest) = 64 AND t.digest NOT GLOB '*[^0-9a-f]*'"


def _name_check(table: str) -> _Check:
    columns = ("tenant",) if table in ("tenants", "api_keys") else ("tenant", "adapter")
    wrong = f"NOT ({' AND '.join(is_id(f't.{column}') for column in columns)})"
    return _Check(table, wrong, "has an invalid name: repairing drops it", (f"DELETE FROM {table} {_BY_ROWID}",))


def _time_check(table: str, column: str) -> _Check:
    problem = f"has no valid time in `{column}`"
    whole = f"typeof(t.{column}) IN ('integer', 'real') AND t.{column} BETWEEN 0 AND {LAST_SECOND}"
    return _Check(table, f"NOT ({whole})", problem, (f"UPDATE {table} SET {column} = {_NOW} {_BY_ROWID}",))


def _number_check(column: str, high: int, repair: tuple[str, ...]) -> _Check:
    wrong = f"typeof(t.{column}) <> 'integer' OR t.{column} NOT BETWEEN 0 AND {high}"
    return _Check("versions", wrong, f"has no valid number in `{column}`", repair)


# In order: a repair may affect what later checks find.
_CHECKS = (
    *map(_name_check, ("promotions", "versions", "adapters", "api_keys", "tenants")),
    _Check(
        "versions",
        f"NOT EXISTS (SELECT 1 FROM adapters a WHERE {_SAME_KEY.format('a', 't')})",
        "refers to an adapter that does not exist",
        (f"INSERT OR IGNORE INTO adapters (tenant, adapter, created, updated)"
         f" SELECT tenant, adapter, {_NOW}, {_NOW} FROM versions {_BY_ROWID}",),
    ),
    _Check(
        "versions",
        "NOT EXISTS (SELECT 1 FROM tenants n WHERE n.tenant = t.tenant)",
        "refers to a tenant that does not exist",
        (f"INSERT OR IGNORE INTO tenants SELECT tenant, {_NOW} FROM versions {_BY_ROWID}",),
    ),
    _Check(
        "api_keys",
        "NOT EXISTS (SELECT 1 FROM tenants n WHERE n.tenant = t.tenant)",
        "refers to a tenant that does not exist: repairing drops it",
        (f"DELETE FROM api_keys {_BY_ROWID}",),
    ),
    _Check(
        "adapters",
        f"typeof(t.last_number) <> 'integer' OR t.last_number < {_LAST_NUMBER.replace('adapters', 't')}",
        "has a last number below those of its versions",
        (f"UPDATE adapters SET last_number = max(CAST(last_number AS INTEGER), {_LAST_NUMBER}) {_BY_ROWID}",),
    ),
    _Check(
        "versions",
        "typeof(t.number) <> 'integer' OR t.number < 1",
        "has no valid number: repairing gives it the adapter's next one",
        (f"UPDATE adapters SET last_number = last_number + 1 WHERE (tenant, adapter) ="
         f" (SELECT tenant, adapter FROM versions {_BY_ROWID})",
         f"UPDATE versions SET number = (SELECT last_number FROM adapters a WHERE {_SAME_KEY.format('a', 'versions')})"
         f" {_BY_ROWID}"),
    ),
    _Check(
        "versions",
        "t.state NOT IN ('READY', 'DRAINING')",
        "has an invalid state",
        (f"UPDATE versions SET state = 'READY' {_BY_ROWID}",),
    ),
    _Check(
        "versions",
        f"NOT {_LABELS}",
        "has labels that are not a JSON object of texts: repairing drops them",
        (f"UPDATE versions SET labels = '{{}}' {_BY_ROWID}",),
    ),
    _Check(
        "versions",
        "typeof(t.method) <> 'text'",
        "has no valid method",
        (f"UPDATE versions SET method = '' {_BY_ROWID}",),
    ),
    _Check("versions", f"NOT ({_DIGEST})", "has no valid digest: delete the version, or its adapter", ()),
    _number_check("rank", MAX_INT32, (f"UPDATE versions SET rank = 0 {_BY_ROWID}",)),
    _number_check("num_virtual_tokens", MAX_INT32, ()),
    _number_check("num_bytes", MAX_INT64, (f"UPDATE versions SET num_bytes = 0 {_BY_ROWID}",)),
    *(_time_check(table, "created") for table in ("tenants", "api_keys", "adapters", "versions")),
    _time_check("adapters", "updated"),
    _Check(
        "promotions",
        f"NOT EXISTS ({_ACTIVE_VERSION} AND v.number = t.number)",
        "refers to a serving or former version that does not exist: repairing drops it",
        (f"DELETE FROM promotions {_BY_ROWID}",),
    ),
    _Check(
        "adapters",
        f"NOT t.deleted AND NOT EXISTS (SELECT 1 FROM promotions p WHERE {_SAME_KEY.format('p', 't')})"
        f" AND EXISTS ({_ACTIVE_VERSION})",
        "has no version that serves: repairing promotes its last one",
        (f"INSERT INTO promotions (tenant, adapter, number) SELECT v.tenant, v.adapter, max(v.number)"
         f" FROM versions v JOIN adapters t ON {_SAME_KEY.format('v', 't')} WHERE t.rowid = ?1 AND v.state = 'READY'",),
    ),
    _Check(
        "adapters",
        f"NOT t.deleted AND NOT EXISTS ({_ACTIVE_VERSION})",
        "has no version: repairing drops it",
        (f"UPDATE adapters SET deleted = 1, pinned = 0, canary_number = NULL, canary_percent = NULL {_BY_ROWID}",),
    ),
    _Check(
        "adapters",
        "(t.canary_number IS NOT NULL OR t.canary_percent IS NOT NULL) AND NOT"
        " (coalesce(typeof(t.canary_percent) = 'integer' AND t.canary_percent BETWEEN 1 AND 99, FALSE)"
        f" AND EXISTS ({_ACTIVE_VERSION} AND v.number = t.canary_number))",
        "has a canary without a share of 1 to 99 percent, or without a version: repairing ends it",
        (f"UPDATE adapters SET canary_number = NULL, canary_percent = NULL {_BY_ROWID}",),
    ),
    _Check(
        "adapters",
        "t.pinned NOT IN (0, 1)",
        "has an invalid `pinned`: repairing unpins it",
        (f"UPDATE adapters SET pinned = 0 {_BY_ROWID}",),
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
    """Yields the problems of a database's rows, over a connection that `rows.prepare` has prepared."""
    for check in _CHECKS:
        for _, name in connection.execute(_query(check)):
            yield RowFault(str(name)[:200], check.problem)


def _query(check: _Check) -> str:
    return f"SELECT t.rowid, {_NAMES[check.table]} FROM {check.table} t WHERE {check.wrong} ORDER BY t.rowid"


class RowChecks:
    """The checks of an open store's rows.

    Args:
        on_changed: called after rows were repaired.
    """

    def __init__(self, database: Database, on_changed: Callable[[], None]) -> None:
        self._database = database
        self._on_changed = on_changed

    def log_faults(self) -> None:
        """Logs the problems of rows, which do not prevent the store from opening."""
        faults = self._database.read(lambda connection: list(row_faults(connection)))
        for fault in faults[:MAX_LOGGED]:
            log.error("the row of %s %s", fault.name, fault.problem)
        if faults:
            log.error("damaged rows in the store: %d; `deltamux store check --repair` repairs them", len(faults))

    def repair(self) -> list[RowFault]:
        """Repairs rows in one transaction; returns the problem of each repaired row."""
        repaired: list[RowFault] = []
        with self._database.transaction():
            for check in _CHECKS:
                for row, name in self._database.fetch_all(_query(check)) if check.repair else ():
                    for statement in check.repair:
                        self._database.execute(statement, row)
                    repaired.append(RowFault(str(name)[:200], check.problem))
        self._on_changed()
        return repaired
