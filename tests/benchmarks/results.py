"""Rows, what the project promises of them, and what they were at the committed baseline."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from deltamux.bench import Comparison
from deltamux.bench.compare import Figure
from deltamux.bench.floor import Floor
from deltamux.bench.measure import percentile

BASELINE = Path(__file__).with_name("baseline.json")
NOISE = 0.05
"""A ratio that moved by less is called neither better nor worse."""

RATE, FIRST_TOKEN, GAP = "tokens/s", "first token, ms", "99 % of gaps, ms"
BEYOND_WARM = "beyond warm, ms"
FIGURES: dict[str, Figure] = {
    RATE: lambda m: m.tokens_per_second,
    FIRST_TOKEN: lambda m: 1000 * m.median_first_token,
    GAP: lambda m: 1000 * percentile(m.gaps, 99),
}
"""What is compared, by metric."""


class Target(NamedTuple):
    """What a row is to reach: at least, for rates; at most, for times. `tiny`: on the small base, if other."""

    value: float
    tiny: float | None = None

    def of(self, size: str) -> float:
        return self.tiny if size == "tiny" and self.tiny is not None else self.value


TARGETS = {
    "loras/1 LoRA": Target(0.93, tiny=0.83),
    "loras/16 LoRAs": Target(0.78, tiny=0.62),
    "methods/all mixed": Target(0.75, tiny=0.6),
    "methods/ia3": Target(0.95),
    "methods/bitfit": Target(0.95),
    "methods/prefix": Target(0.95),
    "long/16 LoRAs": Target(0.85),
    "plain/base": Target(0.99),
    "vllm-lora/16 LoRAs, prompt 8": Target(2.0),
    "vllm-lora/16 LoRAs, prompt 256": Target(4.0),
    "peft/16 LoRAs, 1 thread": Target(3.0),
    "peft/16 LoRAs, all threads": Target(3.0),
    "zipf/2000 adapters, 8 slots": Target(0.95),
    "zipf/2000 adapters, 32 slots": Target(0.95),
    "slots/16 LoRAs, 8 slots": Target(2.0),
    "grpc/base": Target(0.95),
    "grpc/16 LoRAs": Target(0.95),
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        part, name: which comparison; against: what it is compared with.
        metric: of `own` and `reference`, the medians of the two sides.
        value: `own` as a multiple of `reference`, or, for BEYOND_WARM, their difference.
        low, high: of the rounds that `value` is the median of.
        floor_bytes, floor_operations: see `deltamux.bench.floor`; None where no floor applies.
        target: what `value` is to reach: at least, or at most where it is a time.
        other_load: cores that other processes used while the part was measured.
    """

    part: str
    name: str
    against: str
    metric: str
    own: float
    reference: float
    value: float
    low: float
    high: float
    floor_bytes: float | None = None
    floor_operations: float | None = None
    target: float | None = None
    other_load: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.part}/{self.name}"

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.metric != RATE

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def worse(self, before: float) -> float:
        """Returns by what share the value is worse than `before`; negative when better."""
        change = self.value / before - 1 if before else 0.0
        return change if self.at_most else -change


def row(part: str, compared: Comparison, against: str, metric: str, floor: Floor | None, size: str) -> Row:
    """Returns the row of a comparison by one metric."""
    figure = FIGURES[metric]
    ratios = compared.ratios(figure)
    target = TARGETS.get(f"{part}/{compared.name}")
    return Row(
        part,
        f"{compared.name}, gaps" if metric == GAP else compared.name,
        against,
        metric,
        own=round(statistics.median(map(figure, compared.own)), 1),
        reference=round(statistics.median(map(figure, compared.reference)), 1),
        value=round(statistics.median(ratios), 3),
        low=round(min(ratios), 3),
        high=round(max(ratios), 3),
        floor_bytes=round(floor.bytes, 3) if floor else None,
        floor_operations=round(floor.operations, 3) if floor else None,
        target=target.of(size) if target else None,
    )


def table(rows: Sequence[Row], *, targets: bool, before: Mapping[str, float] | None) -> Table:
    """Returns the rows as a table; `before` are the baseline's values, for a column of what changed."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    made.add_column("part")
    made.add_column("workload")
    made.add_column("against")
    for head in ("own", "reference"):
        made.add_column(head, justify="right")
    made.add_column("")
    for head in ("ratio", "rounds", "floor", *(["target"] if targets else []), *(["change"] if before else [])):
        made.add_column(head, justify="right")
    for row in rows:
        made.add_row(*_cells(row, targets, before))
    return made


def _cells(row: Row, targets: bool, before: Mapping[str, float] | None) -> list[str]:
    digits = 1 if row.metric == BEYOND_WARM else 2
    cells = [row.part, row.name, row.against, f"{row.own:,.0f}", f"{row.reference:,.0f}", row.metric]
    cells += [f"[bold]{row.value:.{digits}f}[/]", f"{row.low:.{digits}f} to {row.high:.{digits}f}"]
    cells += ["" if row.floor_bytes is None else f"{row.floor_bytes:.2f} / {row.floor_operations:.2f}"]
    if targets:
        sign = "≤" if row.at_most else "≥"
        colour = "green" if row.met else "red"
        cells += ["" if row.target is None else f"[{colour}]{sign} {row.target:.{digits}f}[/]"]
    if before:
        cells += [_change(row, before.get(row.key))]
    return cells


def _change(row: Row, before: float | None) -> str:
    if before is None:
        return "new"
    worse = row.worse(before)
    colour = "red" if worse > NOISE else "green" if worse < -NOISE else "dim"
    return f"[{colour}]{row.value / before - 1:+.0%}[/]" if before else ""


def read_json(path: Path, base: str) -> list[Row]:
    """Returns the rows of an earlier run over the same base; none where there is no such file."""
    if not path.exists():
        return []
    known: dict[str, Any] = json.loads(path.read_text())
    return [Row(**row) for row in known["rows"]] if known["about"]["base"] == base else []


def write_json(path: Path, about: Mapping[str, object], rows: Sequence[Row]) -> None:
    path.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def read_baseline(size: str) -> dict[str, float]:
    """Returns the committed values of a size by key; none where it has none."""
    return dict(_read().get(size, {}).get("values", {}))


def write_baseline(size: str, about: Mapping[str, object], rows: Sequence[Row]) -> None:
    """Puts the rows into the committed file; those of parts that did not run stay."""
    values = read_baseline(size) | {row.key: row.value for row in rows}
    sizes = _read() | {size: {"about": dict(about), "values": dict(sorted(values.items()))}}
    BASELINE.write_text(json.dumps(sizes, indent=2, sort_keys=True) + "\n")


def _read() -> dict[str, dict[str, Any]]:
    return dict(json.loads(BASELINE.read_text())) if BASELINE.exists() else {}
