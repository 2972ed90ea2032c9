"""The table of bases: adapters of each kind on every architecture, each in a process of its own (`make bases`)."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from bases.configs import BASES, READ_IMAGES, save_base

PATIENCE_SECONDS = 600
MARK, IMAGES_MARK = "<!-- make bases -->", "<!-- make bases, that read images -->"
EXACT, REFUSED, NO_PEFT = "exact", "refused: ", "PEFT "
DIFFERS = "vLLM itself differs from transformers"


def row(name: str, *, eager: bool) -> dict[str, str]:
    """Returns what comes of each kind of adapter on one base."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [sys.executable, "-m", "bases", "--one", name, "--output", str(output)]
        try:
            done = subprocess.run(
                [*command, *(["--eager"] if eager else [])],
                timeout=PATIENCE_SECONDS,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"base": f"DID NOT END within {PATIENCE_SECONDS} s"}
        if not output.exists():
            errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
            return {"base": f"TRACEBACK: {errors[-1] if errors else done.returncode}"}
        found: dict[str, str] = json.loads(output.read_text(encoding="utf-8"))
        return found


def markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the rows as a table, and below it each reason of a refusal with the bases that give it."""
    kinds = list(dict.fromkeys(kind for found in rows.values() for kind in found if found.get("base") == EXACT))
    lines = [f"| architecture | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    reasons: dict[str, list[str]] = {}
    for name, found in rows.items():
        alone = "" if found.get("base") == EXACT else found.get("base", "")
        cells = [_cell(found.get(kind, alone)) for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        for outcome in found.values():
            if outcome != EXACT and not outcome.startswith(NO_PEFT):
                reasons.setdefault(_reason(outcome), []).append(name)
    notes = [f"- {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    return "\n".join([*lines, "", *notes, ""])


def _reason(outcome: str) -> str:
    """Returns why something is refused, the same for all bases that are refused for it."""
    reason = outcome.removeprefix(REFUSED)
    reason = re.sub(r"^the engine cannot use program \w+: |/\S*/base |\(\[[^]]*]\)", "", reason)
    reason = re.sub(r"^\d+ tensor\(s\) of the file .*; '[^']*' (?=is outside)", "a module of the adapter ", reason)
    reason = re.sub(r"(?<=targets) \('[^']*'\)", "", reason)
    return re.sub(r"differs by ([\d.]+)", lambda found: f"differs by {float(found[1]):.3f}", reason)


def _cell(outcome: str) -> str:
    if outcome in ("", EXACT):
        return outcome
    if outcome.startswith(DIFFERS):
        return "base differs"
    return "-" if outcome.startswith(NO_PEFT) else "refused" if outcome.startswith(REFUSED) else f"**{outcome}**"


def write_page(page: Path, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Replaces what follows each mark in a page, up to the next heading, by the table of rows that belong there."""
    text = page.read_text(encoding="utf-8")
    for mark, with_images in ((MARK, False), (IMAGES_MARK, True)):
        chosen = {name: found for name, found in rows.items() if (name in READ_IMAGES) == with_images}
        if chosen:
            head, _, rest = text.partition(mark)
            _, heading, tail = rest.partition("\n## ")
            text = f"{head}{mark}\n\n{date.today()}.\n\n{markdown(chosen)}{heading}{tail}"
    page.write_text(text, encoding="utf-8")


def lacks(name: str) -> str:
    """Returns why a base is not tried here; "" where it is."""
    if name in READ_IMAGES and find_spec("torchvision") is None:
        return "skipped: vLLM's models of bases that read images import torchvision, which is not installed"
    return ""


def main() -> int:
    summary = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(prog="bases", description=summary)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures (default: all)")
    parser.add_argument("--one", choices=BASES, help="this one, in this process")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--output", type=Path, help="JSON file; rows of other architectures in it are kept")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced by that of the JSON file")
    given = parser.parse_args()
    if given.one:
        from bases.check import check_base

        with tempfile.TemporaryDirectory() as folder:
            found = check_base(save_base(Path(folder) / "base", given.one), Path(folder), eager=given.eager)
        given.output.write_text(json.dumps(found), encoding="utf-8")
        return 0
    known = json.loads(given.output.read_text(encoding="utf-8")) if given.output and given.output.exists() else {}
    for name in given.names or BASES:
        if why := lacks(name):
            print(name, why, flush=True)
            continue
        known[name] = row(name, eager=given.eager)
        print(name, *(f"\n    {kind}: {outcome}" for kind, outcome in known[name].items()), flush=True)
        if given.output:
            given.output.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    if given.page:
        write_page(given.page, {name: known[name] for name in BASES if name in known})
    return 0 if all(found.get("base", "").startswith((EXACT, REFUSED, DIFFERS)) for found in known.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
