"""The table of bases: every architecture in a process of its own (`make bases`)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bases.configs import BASES, save_base

PATIENCE_SECONDS = 400


def row(name: str, *, eager: bool) -> dict[str, str]:
    """Returns what comes of each kind of adapter on one base, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [
            sys.executable,
            "-m",
            "bases",
            "--one",
            name,
            "--output",
            str(output),
            *(["--eager"] if eager else []),
        ]
        try:
            done = subprocess.run(command, timeout=PATIENCE_SECONDS, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return {"base": f"DID NOT END within {PATIENCE_SECONDS} s"}
        if not output.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return {"base": f"TRACEBACK: {lines[-1] if lines else done.returncode}"}
        found: dict[str, str] = json.loads(output.read_text())
        return found


def main() -> int:
    summary = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(prog="bases", description=summary)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures (default: all)")
    parser.add_argument("--one", choices=BASES, help="this one, in this process")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args()
    if given.one:
        from bases.check import check_base

        with tempfile.TemporaryDirectory() as folder:
            found = check_base(save_base(Path(folder) / "base", given.one), Path(folder), eager=given.eager)
        given.output.write_text(json.dumps(found))
        return 0
    rows: dict[str, dict[str, str]] = {}
    for name in given.names or BASES:
        rows[name] = row(name, eager=given.eager)
        print(name, *(f"\n    {kind}: {outcome}" for kind, outcome in rows[name].items()), flush=True)
        if given.output:
            given.output.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
