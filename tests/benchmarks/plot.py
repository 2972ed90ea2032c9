"""The ratios as a picture: one bar per row, with its floor and its target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RATE, Row

PEERS = ("vllm-lora", "peft")
BAR, FLOOR, TARGET = "#4c78a8", "#9aa5b1", "#e45756"
TITLES = ("tokens per second, of the reference's", "tokens per second, times a peer's")


def plot(path: Path, rows: Sequence[Row], subtitle: str) -> None:
    """Draws rates in two panels: shares of a reference that does no adapter's work, and multiples of the peers'."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rates = [row for row in rows if row.metric == RATE]
    panels = [[r for r in rates if r.part not in PEERS], [r for r in rates if r.part in PEERS]]
    shown = [(title, panel) for title, panel in zip(TITLES, panels, strict=True) if panel]
    if not shown:
        return
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "deltamux"}):
        height = 1.2 + sum(0.8 + 0.28 * len(panel) for _, panel in shown)
        figure = Figure(figsize=(8, height), layout="constrained")
        grid: Any = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[len(p) + 1 for _, p in shown])
        for axes, (title, panel) in zip(grid[:, 0], shown, strict=True):
            _draw(axes, title, panel)
        figure.suptitle(subtitle, fontsize=8, color="#555555")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axes: Any, title: str, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    values = [row.value for row in rows]
    spread = [[r.value - r.low for r in rows], [r.high - r.value for r in rows]]
    axes.barh(places, values, height=0.6, color=BAR, xerr=spread, error_kw={"ecolor": "#1f3350", "lw": 1})
    _marks(axes, "floor (bytes)", FLOOR, [(i, r.floor_bytes) for i, r in enumerate(rows)])
    _marks(axes, "target", TARGET, [(i, r.target) for i, r in enumerate(rows)])
    axes.set_yticks(places, [f"{row.part}: {row.name}  ·  {row.against}" for row in rows])
    axes.invert_yaxis()
    axes.axvline(1.0, color="#333333", lw=0.8)
    axes.set_xlim(0, max(1.1, 1.1 * max(row.high for row in rows)))
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.bar_label(axes.containers[-1], labels=[f"{v:.2f}" for v in values], label_type="center", color="white")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if any(row.floor_bytes or row.target for row in rows):
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8)


def _marks(axes: Any, label: str, colour: str, points: Sequence[tuple[int, float | None]]) -> None:
    known = [(place, value) for place, value in points if value is not None]
    if known:
        places, values = zip(*known, strict=True)
        axes.scatter(values, places, marker="|", s=130, linewidths=2, color=colour, label=label, zorder=3)
