"""`deltamux bench`."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deltamux.cli.connect import add_address, add_credentials, credentials
from deltamux.cli.options import add_options, given_options
from deltamux.cli.output import add_json, show

COLUMNS = (
    "workload", "prompt_tokens", "tokens_per_second", "of_base",
    "first_token_p50", "first_token_p95", "first_token_p99", "gap_p50", "gap_p95", "gap_p99",
)  # fmt: skip
ENGINE_OPTIONS = ("dtype", "device", "kv_cache_gib", "enforce_eager")
FLOORS = ("floor_bytes", "floor_operations")


def add_commands(commands: Any) -> None:
    from deltamux.bench.run import BenchOptions
    from deltamux.engine.base import EngineOptions

    parser = commands.add_parser(
        "bench",
        help="measure how fast a base serves your adapters",
        description="Measure tokens per second, times to the first token and between tokens (milliseconds; "
        "percentiles), and the ratio to the base, measured in turn with it: each adapter alone, then all in one batch.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", help="directory or Hugging Face id of the base; an engine is started for it")
    add_address(where, help="host:port or unix:path of a running server")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR|NAME",
        help="with --model a directory, with --server tenants/T/adapters/A[/versions/N]; may be repeated",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=[8], metavar="N", help="lengths of prompts (default: 8)"
    )
    add_options(parser, BenchOptions)
    add_options(parser.add_argument_group("with --model"), EngineOptions, ENGINE_OPTIONS)
    add_credentials(parser.add_argument_group("with --server"))
    add_json(parser)
    parser.set_defaults(run=_bench, extra="serve")


def _bench(arguments: argparse.Namespace) -> None:
    import asyncio

    with _progress() as progress:
        rows = asyncio.run(_rows(arguments, progress))
    floors = FLOORS if arguments.model and arguments.adapter else ()
    show(rows, (*COLUMNS, *floors), as_json=arguments.json)


async def _rows(arguments: argparse.Namespace, progress: Callable[[str], None]) -> list[Any]:
    from deltamux.bench.run import BenchOptions, bench_model, bench_server
    from deltamux.engine.base import EngineOptions

    given = given_options(arguments, BenchOptions)
    options = BenchOptions(tuple(arguments.adapter), tuple(arguments.prompt_tokens), **given)
    if arguments.server:
        from deltamux.client import AsyncClient

        async with AsyncClient(arguments.server, **credentials(arguments)) as client:
            return await bench_server(options, client, progress)
    engine = EngineOptions(
        **given_options(arguments, EngineOptions),
        max_num_seqs=options.sequences,
        max_active_adapters=max(1, len(options.adapters)),
    )
    return await bench_model(options, engine, progress)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yields what shows on a terminal which run is under way; without a terminal it prints nothing."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("measuring") as status:
        yield status.update
