"""`deltamux adapter`: upload, list, promote and delete."""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deltamux.cli.connect import add_connection, connect
from deltamux.cli.output import add_json, show, show_one
from deltamux.cli.parts import weighted

ADAPTER_COLUMNS = ("name", "serving_version", "previous_version", "canary_percent", "pinned", "updated")
VERSION_COLUMNS = ("version", "method", "state", "rank", "num_virtual_tokens", "size_bytes", "digest", "created")


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("adapter", help="upload, list, promote and delete adapters")
    group = parser.add_subparsers(metavar="COMMAND", required=True)
    upload = _command(group, "upload", _upload, "upload a directory as a new version")
    upload.add_argument("path", type=Path, help="directory with adapter_config.json and adapter_model.safetensors")
    upload.add_argument("--promote", action="store_true", default=None, help="serve the new version at once")
    upload.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="kept with the version; may be repeated"
    )
    upload.add_argument("--method", default="", help="refuse the upload unless it is of this method")
    listing = group.add_parser("list", help="list a tenant's adapters")
    listing.add_argument("tenant", help="tenants/T, or T")
    _finish(listing, _list)
    _command(group, "show", _show, "show an adapter and its versions")
    compose = _command(group, "compose", _compose, "make one adapter of several that the server holds")
    compose.add_argument("parts", nargs="+", metavar="PART[=WEIGHT]", help="adapters or versions, in order")
    compose.add_argument(
        "--mode",
        choices=("stack", "sum"),
        default="stack",
        help="one after the other, or their weighted sum (default: %(default)s)",
    )
    compose.add_argument("--promote", action="store_true", default=None, help="serve the new version at once")
    promote = _command(group, "promote", _promote, "route the adapter's name to a version")
    promote.add_argument("version", type=int, help="number of the version")
    promote.add_argument("--canary-percent", type=int, default=0, help="a share of the traffic instead of all of it")
    _command(group, "rollback", _rollback, "end a canary, or return to the previous version")
    _command(group, "delete", _delete, "delete an adapter, or one version")
    _command(group, "pin", _pin, "keep an adapter in the engine's memory")
    _command(group, "unpin", _unpin, "let an adapter be evicted from the engine's memory again")


Run = Callable[[argparse.Namespace], None]


def _command(group: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = group.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.add_argument("name", help="tenants/T/adapters/A" + ("[/versions/N]" if name == "delete" else ""))
    return _finish(parser, run)


def _finish(parser: argparse.ArgumentParser, run: Run) -> argparse.ArgumentParser:
    add_json(parser)
    add_connection(parser)
    parser.set_defaults(run=run)
    return parser


def _upload(arguments: argparse.Namespace) -> None:
    labels = dict(label.partition("=")[::2] for label in arguments.label)
    with ExitStack() as stack:
        client = stack.enter_context(connect(arguments))
        version = client.upload_adapter(
            arguments.name,
            arguments.path,
            method=arguments.method,
            promote=arguments.promote,
            labels=labels,
            progress=_progress_bar(stack) if sys.stderr.isatty() else None,
        )
    show_one(version, as_json=arguments.json)


def _progress_bar(stack: ExitStack) -> Callable[[int, int], None]:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    bar = stack.enter_context(Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn(),
                                       console=Console(stderr=True), transient=True))  # fmt: skip
    task = bar.add_task("upload", total=None)
    return lambda sent, total: bar.update(task, completed=sent, total=total)


def _list(arguments: argparse.Namespace) -> None:
    parent = arguments.tenant if "/" in arguments.tenant else f"tenants/{arguments.tenant}"
    with connect(arguments) as client:
        show(client.list_adapters(parent), ADAPTER_COLUMNS, as_json=arguments.json)


def _show(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        adapter = client.get_adapter(arguments.name)
        versions = client.list_adapter_versions(arguments.name)
    if arguments.json:
        import json

        from deltamux.cli.output import plain

        print(json.dumps({**plain(adapter), "versions": [plain(version) for version in versions]}, indent=2))
        return
    show_one(adapter, as_json=False)
    print()
    show(versions, VERSION_COLUMNS, as_json=False)


def _compose(arguments: argparse.Namespace) -> None:
    parts = dict(weighted(part) for part in arguments.parts)
    with connect(arguments) as client:
        version = client.compose_adapter(arguments.name, parts, mode=arguments.mode, promote=arguments.promote)
    show_one(version, as_json=arguments.json)


def _promote(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        percent = arguments.canary_percent
        adapter = client.promote(arguments.name, version=arguments.version, canary_percent=percent)
    show_one(adapter, as_json=arguments.json)


def _rollback(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        show_one(client.rollback(arguments.name), as_json=arguments.json)


def _delete(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        client.delete_adapter(arguments.name)
    print("{}" if arguments.json else f"deleted {arguments.name}")


def _pin(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        show_one(client.pin_adapter(arguments.name), as_json=arguments.json)


def _unpin(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        show_one(client.unpin_adapter(arguments.name), as_json=arguments.json)
