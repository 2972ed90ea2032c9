"""`deltamux tenant`: tenants and their API keys."""

import argparse
from collections.abc import Callable
from typing import Any

from deltamux.cli.connect import add_connection, connect
from deltamux.cli.output import add_json, show, show_one

Run = Callable[[argparse.Namespace], None]


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("tenant", help="create tenants and their API keys")
    group = parser.add_subparsers(metavar="COMMAND", required=True)
    _command(group, "create", _create, "create a tenant")
    _command(group, "list", _list, "list all tenants", named=False)
    _command(group, "show", _show, "show a tenant")
    delete = _command(group, "delete", _delete, "delete a tenant and its keys")
    delete.add_argument("--force", action="store_true", help="its adapters, too")
    _command(group, "create-key", _create_key, "make an API key; the secret is shown once")
    _command(group, "list-keys", _list_keys, "list a tenant's API keys")
    revoke = _command(group, "delete-key", _delete_key, "revoke an API key", named=False)
    revoke.add_argument("key", help="tenants/T/keys/K")


def _command(group: Any, name: str, run: Run, text: str, *, named: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = group.add_parser(name, help=text, description=text.capitalize() + ".")
    if named:
        parser.add_argument("tenant", help="tenants/T, or T")
    add_json(parser)
    add_connection(parser)
    parser.set_defaults(run=run)
    return parser


def _name(arguments: argparse.Namespace) -> str:
    return f"tenants/{_id(arguments)}"


def _id(arguments: argparse.Namespace) -> str:
    tenant: str = arguments.tenant
    return tenant.removeprefix("tenants/")


def _create(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        show_one(client.create_tenant(_id(arguments)), as_json=arguments.json)


def _list(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        show(client.list_tenants(), ("name", "created"), as_json=arguments.json)


def _show(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        show_one(client.get_tenant(_name(arguments)), as_json=arguments.json)


def _delete(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        client.delete_tenant(_name(arguments), force=arguments.force)
    print("{}" if arguments.json else f"deleted {_name(arguments)}")


def _create_key(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        show_one(client.create_api_key(_name(arguments)), as_json=arguments.json)


def _list_keys(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        show(client.list_api_keys(_name(arguments)), ("name", "created"), as_json=arguments.json)


def _delete_key(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        client.delete_api_key(arguments.key)
    print("{}" if arguments.json else f"revoked {arguments.key}")
