"""The suite itself: a run of a minute yields all its rows, whatever they say. No time decides anything here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main as suite
from benchmarks.parts import PARTS
from benchmarks.results import BEYOND_WARM, RATE, TARGETS, Row, read_baseline, table, write_baseline
from deltamux.cli import main as deltamux
from deltamux.deltas import BaseModel
from deltamux_testing.adapters import write_own

QUICK = ("--tokens", "2", "--sequences", "4", "--repeats", "1", "--enforce-eager")


def row(value: float, metric: str = RATE, target: float | None = None) -> Row:
    return Row("loras", "1 LoRA", "base", metric, 90, 100, value, value, value, target=target)


@pytest.mark.engine
def test_a_run_yields_every_row_and_a_picture(base_directory: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "rows.json", tmp_path / "rows.svg"
    parts = ("--only", "loras", "methods", "cold")
    suite(["--model", str(base_directory), *parts, *QUICK, "--output", str(output), "--plot", str(picture)])
    found: dict[str, Any] = json.loads(output.read_text())
    rows = {(r["part"], r["name"]): r for r in found["rows"]}
    names = {part: [name for p, name in rows if p == part] for part in ("loras", "methods", "cold")}
    assert names["loras"] == ["1 LoRA", "4 LoRAs", "16 LoRAs", "32 LoRAs", "ranks 4 to 64", "16 LoRAs of 32"]
    assert names["methods"] == ["ia3", "bitfit", "prefix", "ln_tuning", "houlsby", "all mixed"]
    assert names["cold"] == ["1 LoRA", "1 LoRA with 8 others"]
    rates = [r for r in rows.values() if r["metric"] == RATE]
    assert all(r["low"] <= r["value"] <= r["high"] and r["own"] > 0 for r in rates)
    floors = [r for r in rates if r["name"] != "16 LoRAs of 32"]
    assert all(0 < r["floor_bytes"] <= 1 and 0 < r["floor_operations"] <= 1 for r in floors)
    assert rows["loras", "16 LoRAs"]["floor_bytes"] == rows["loras", "4 LoRAs"]["floor_bytes"]  # four in a batch
    assert rows["cold", "1 LoRA"]["target"] > 50
    assert found["about"]["tokens"] == 2
    assert "32 LoRAs" in picture.read_text()


@pytest.mark.engine
def test_a_users_own_base_and_adapters_are_measured(
    base_directory: Path, base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [write_own(method, base, tmp_path / method) for method in ("lora", "prefix")]
    adapters = [part for path in made for part in ("--adapter", str(path))]
    assert (
        deltamux(["bench", "--model", str(base_directory), *adapters, *QUICK, "--kv-cache-gib", "0.25", "--json"]) == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert [r["workload"] for r in rows] == ["base", str(made[0]), str(made[1]), "all 2 mixed"]
    assert all(r["of_base"] > 0 and 0 < r["floor_bytes"] <= 1 for r in rows[1:])
    assert rows[2]["floor_bytes"] == 1.0  # a prefix has no parameter that a row meets


def test_every_target_is_of_a_part_that_exists() -> None:
    assert {key.partition("/")[0] for key in TARGETS} <= PARTS.keys()


def test_rates_are_to_reach_their_target_and_times_to_stay_below() -> None:
    assert row(0.9, target=0.8).met
    assert not row(0.7, target=0.8).met
    assert row(40, BEYOND_WARM, target=50).met
    assert not row(60, BEYOND_WARM, target=50).met
    assert row(0.9).met is None


def test_the_table_shows_what_became_worse_than_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.results.BASELINE", tmp_path / "baseline.json")
    write_baseline("tiny", {"date": "2026-01-01"}, [row(0.8)])
    write_baseline("mid", {"date": "2026-01-02"}, [row(0.9)])
    before = read_baseline("tiny")
    assert before == {"loras/1 LoRA": 0.8}
    shown = table([row(0.6)], targets=True, before=before)
    assert [column.header for column in shown.columns][-2:] == ["target", "change"]
    assert list(shown.columns[-1].cells) == ["[red]-25%[/]"]
