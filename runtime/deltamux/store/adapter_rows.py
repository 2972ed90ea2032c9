"""Changes of the rows of adapters and versions."""

import json
import time
from collections.abc import Mapping

from deltamux.store.database import Database
from deltamux.store.records import AdapterKey, CompiledAdapter, VersionState

OF_TENANT = "tenant = ?"
OF_ADAPTER = "tenant = ? AND adapter = ?"
OF_VERSION = "tenant = ? AND adapter = ? AND number = ?"
"""Conditions, with the values of the key as their parameters."""


class AdapterRows:
    """The statements of changes; every method is called inside a transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_version(self, key: AdapterKey, compiled: CompiledAdapter, labels: Mapping[str, str] | None) -> int:
        """Returns the number of the version with a content; inserts one if there is none. Labels replace its own."""
        row = self._database.fetch_one(
            f"SELECT number FROM versions WHERE {OF_ADAPTER} AND digest = ? AND state <> ?",
            *key, compiled.digest, VersionState.DRAINING,
        )  # fmt: skip
        if row is None:
            return self._insert_version(key, compiled, labels or {})
        number: int = row["number"]
        if labels:
            self._database.execute(
                f"UPDATE versions SET labels = ? WHERE {OF_VERSION}", json.dumps(dict(labels)), *key, number
            )
        return number

    def _insert_version(self, key: AdapterKey, compiled: CompiledAdapter, labels: Mapping[str, str]) -> int:
        run, now = self._database.execute, time.time()
        run("INSERT OR IGNORE INTO tenants VALUES (?, ?)", key.tenant, now)
        run("INSERT OR IGNORE INTO adapters (tenant, adapter, created, updated) VALUES (?, ?, ?, ?)", *key, now, now)
        run(
            "UPDATE adapters SET updated = ?, deleted = 0,"
            " last_number = 1 + max(CAST(last_number AS INTEGER), (SELECT coalesce(max(CAST(number AS INTEGER)), 0)"
            " FROM versions v WHERE v.tenant = adapters.tenant AND v.adapter = adapters.adapter)),"
            f" created = CASE deleted WHEN 1 THEN ? ELSE created END WHERE {OF_ADAPTER}",
            now, now, *key,
        )  # fmt: skip
        number: int = self._database.fetch_one(f"SELECT last_number FROM adapters WHERE {OF_ADAPTER}", *key)[0]
        run(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *key, number, VersionState.READY, compiled.digest, compiled.method, compiled.rank,
            compiled.num_virtual_tokens, compiled.num_bytes, json.dumps(dict(labels)), now,
        )  # fmt: skip
        return number

    def serves(self, key: AdapterKey) -> bool:
        """Whether an adapter has a serving version."""
        return self._database.fetch_one(f"SELECT 1 FROM promotions WHERE {OF_ADAPTER}", *key) is not None

    def promote(self, key: AdapterKey, number: int) -> None:
        """Makes a version the serving one, and ends the canary."""
        self.set_canary(key, None, None)
        serving = self._database.fetch_one(
            f"SELECT number FROM promotions WHERE {OF_ADAPTER} ORDER BY id DESC LIMIT 1", *key
        )
        if serving is None or serving["number"] != number:
            self._database.execute("INSERT INTO promotions (tenant, adapter, number) VALUES (?, ?, ?)", *key, number)

    def undo_promotions(self, key: AdapterKey, number: int) -> None:
        """Deletes the promotions after the last one of a version."""
        last = f"SELECT max(id) FROM promotions WHERE {OF_VERSION}"
        self._database.execute(f"DELETE FROM promotions WHERE {OF_ADAPTER} AND id > ({last})", *key, *key, number)

    def set_canary(self, key: AdapterKey, number: int | None, percent: int | None) -> None:
        sql = f"UPDATE adapters SET canary_number = ?, canary_percent = ? WHERE {OF_ADAPTER}"
        self._database.execute(sql, number, percent, *key)

    def set_pinned(self, key: AdapterKey, pinned: bool) -> None:
        self._database.execute(f"UPDATE adapters SET pinned = ? WHERE {OF_ADAPTER}", pinned, *key)

    def touch(self, key: AdapterKey) -> None:
        """Sets the time of an adapter's last change."""
        self._database.execute(f"UPDATE adapters SET updated = ? WHERE {OF_ADAPTER}", time.time(), *key)

    def hide_adapters(self, condition: str, *values: object) -> None:
        """Hides adapters, and marks their versions as draining."""
        self._database.execute(
            "UPDATE adapters SET deleted = 1, pinned = 0, canary_number = NULL, canary_percent = NULL"
            f" WHERE {condition}", *values
        )  # fmt: skip
        self.hide_versions(condition, *values)

    def hide_versions(self, condition: str, *values: object) -> None:
        """Marks versions as draining, and deletes their promotions."""
        self._database.execute(f"DELETE FROM promotions WHERE {condition}", *values)
        self._database.execute(f"UPDATE versions SET state = ? WHERE {condition}", VersionState.DRAINING, *values)
