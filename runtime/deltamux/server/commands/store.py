"""`deltamux store`: check, repair, clean, back up and restore the directory of a server's adapters."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltamux.cli.output import add_json

Run = Callable[[argparse.Namespace], int]


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("store", help="check, repair, back up and restore a store")
    group = parser.add_subparsers(metavar="COMMAND", required=True)
    check = _command(group, "check", _check, "check every stored program, rows against files and files against rows")
    check.add_argument(
        "--repair",
        nargs="*",
        type=Path,
        metavar="UPLOAD_DIR",
        help="repair damaged rows, replace damaged files by those of these uploads, store every program's state",
    )
    check.add_argument("--model", help="with --repair: the base model, to recompile damaged programs")
    check.add_argument(
        "--adopt",
        action="store_true",
        help="accept the present database, or a new one, for the objects; versions that it lacks are dropped",
    )
    gc = _command(group, "gc", _gc, "list the objects that no version refers to, or remove them")
    gc.add_argument("--yes", action="store_true", help="remove them")
    backup = _command(group, "backup", _backup, "copy a store, also one that a server uses")
    backup.add_argument("target", type=Path, help="a new or empty directory")
    restore = _command(group, "restore", _restore, "replace a store by a backup's copy", first="backup")
    restore.add_argument(
        "store", type=Path, help="the store's directory; its former files are moved into a folder of it"
    )


def _command(group: Any, name: str, run: Run, text: str, *, first: str = "store") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = group.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.add_argument(first, type=Path, help=f"the {first}'s directory")
    add_json(parser)
    parser.set_defaults(run=run, extra="serve")
    return parser


def _check(arguments: argparse.Namespace) -> int:
    from deltamux.store import AdapterStore
    from deltamux.store.inspection import inspect

    done: list[str] = []
    if arguments.adopt:
        AdapterStore.open(arguments.store, adopt=True).close()
        done.append("the database is accepted; `deltamux store gc` removes the objects that are not in it")
    if arguments.repair is not None:
        store = AdapterStore.open(arguments.store)
        try:
            done += _repair(store, arguments.repair, arguments.model)
        finally:
            store.close()
    with _progress("checked") as progress:
        report = inspect(arguments.store, progress)
    return _print_report(report, done, as_json=arguments.json)


def _repair(store: Any, uploads: Sequence[Path], model: str | None) -> list[str]:
    done = [f"the row of {fault.name} {fault.problem}: repaired" for fault in store.rows.repair()]
    for directory in uploads:
        with store.staging() as staged:
            records = store.programs.repair_upload(directory, staged)
        names = ", ".join(str(record.key) for record in records)
        done.append(f"{directory}: the files of {names}" if names else f"{directory}: no version has these files")
    if model is None:
        if store.programs.damaged():
            done.append("damaged programs are recompiled with `--model BASE`, or by `deltamux serve --recompile`")
        return done
    return done + _recompile(store, model)


def _recompile(store: Any, model: str) -> list[str]:
    import asyncio

    from deltamux.server.compiling.job import Budgets
    from deltamux.server.compiling.recompiling import recompile_damaged
    from deltamux.server.options import ServeOptions

    limits = ServeOptions(model=model, store=store.root)
    budgets = Budgets(limits.max_lora_rank, limits.max_virtual_tokens, limits.max_adapter_bytes)
    results = asyncio.run(recompile_damaged(store, model, budgets))
    return [f"{record.key}: {problem or 'recompiled'}" for record, problem in results]


def _gc(arguments: argparse.Namespace) -> int:
    from deltamux.store import AdapterStore
    from deltamux.store.inspection import Kind, inspect

    if not arguments.yes:
        orphans = [finding.digest for finding in inspect(arguments.store).of_kind(Kind.ORPHAN)]
        return _print_orphans(orphans, "no version refers to; `--yes` removes them", as_json=arguments.json)
    store = AdapterStore.open(arguments.store)
    try:
        removed = store.collect_orphans()
    finally:
        store.close()
    return _print_orphans(removed, "no version referred to: removed", as_json=arguments.json)


def _print_orphans(digests: Sequence[str], what: str, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(list(digests), indent=2))
        return 0
    print(f"{_count(len(digests), 'object')} that {what}" if digests else "every object belongs to a version")
    for digest in digests:
        print(f"  {digest}")
    return 0


def _backup(arguments: argparse.Namespace) -> int:
    from deltamux.store.backup import backup

    with _progress("copied") as progress:
        report = backup(arguments.store, arguments.target, progress)
    return _print_report(report, [f"{arguments.store} was copied to {arguments.target}"], as_json=arguments.json)


def _restore(arguments: argparse.Namespace) -> int:
    from deltamux.store.backup import restore

    restored = restore(arguments.backup, arguments.store)
    done = [f"{arguments.store} was restored from {arguments.backup}"]
    if restored.replaced is not None:
        done.append(f"the former store is in {restored.replaced}; delete it when it is not needed")
    return _print_report(restored.report, done, as_json=arguments.json)


def _print_report(report: Any, done: Sequence[str], *, as_json: bool) -> int:
    """Prints a report; returns the exit status: 1 if there are findings."""
    if as_json:
        findings = [
            {"kind": f.kind, "digest": f.digest, "versions": f.versions, "message": f.message} for f in report.findings
        ]
        document = {
            "store_id": report.identity.store_id,
            "generation": report.identity.generation,
            "base_fingerprint": report.identity.base_fingerprint,
            "versions": report.versions,
            "contents": report.contents,
            "done": list(done),
            "findings": findings,
        }
        print(json.dumps(document, indent=2))
        return 1 if findings else 0
    for line in done:
        print(line)
    for finding in report.findings:
        print(f"{finding.kind}: {', '.join(finding.versions) or finding.digest}")
        print(f"  {finding.message}" + (f" (object {finding.digest[:12]})" if finding.digest else ""))
    wrong = _count(len(report.findings), "problem") if report.findings else "no problems"
    held = f"{_count(report.versions, 'version')} of {_count(report.contents, 'content')}"
    print(f"store {report.identity}: {held}, {wrong}")
    return 1 if report.findings else 0


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a progress callback: a bar on a terminal, else a line per thousand contents."""
    if not sys.stderr.isatty():
        yield lambda done, total: _print_thousands(verb, done, total)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_thousands(verb: str, done: int, total: int) -> None:
    if done and done % 1000 == 0:
        print(f"{verb} {done} of {total}", file=sys.stderr)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
