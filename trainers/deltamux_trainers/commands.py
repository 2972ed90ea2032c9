"""The trainers' commands: `deltamux data`, `train`, `evaluate`, `merge`, `compress`, `compose`, `demo` and `convert`.

Importing this module imports neither torch nor transformers.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltamux.cli.options import add_options, given_options
from deltamux.cli.output import add_json, show_one
from deltamux.cli.parts import weighted
from deltamux.cli.paths import path
from deltamux.options import DTYPES
from deltamux_trainers.options import EvaluateOptions, TrainOptions, read_config

EXTRA = "train"
BASE = "directory or Hugging Face id of the base"


def add_commands(commands: Any) -> None:
    _add_data(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_merge(commands)
    _add_compress(commands)
    _add_compose(commands)
    _add_demo(commands)
    _add_convert(commands)


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="look at training data").add_subparsers(metavar="COMMAND", required=True)
    check = data.add_parser(
        "check",
        help="count what training would learn, and show it",
        description="Read, render and tokenise a file as `train` does; no weights are loaded.",
    )
    add_options(check, TrainOptions, ("model", "data", "max_length", "turns"))
    check.add_argument(
        "--show", type=int, default=0, metavar="N", help="print the first N sequences, what is learnt between [[ and ]]"
    )
    add_json(check)
    check.set_defaults(run=_check_data, extra=EXTRA)


def _add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train an adapter", description="Train an adapter of any method.")
    add_options(parser, TrainOptions)
    parser.add_argument("--config", type=path, metavar="F.yaml", help="the method's options")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one option of the method")
    add_json(parser)
    parser.set_defaults(run=_train, extra=EXTRA)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a base or an adapter",
        description="Evaluate a base, or a base with an adapter, on rows of data; no server is needed.",
    )
    add_options(parser, EvaluateOptions)
    add_json(parser)
    parser.set_defaults(run=_evaluate, extra=EXTRA)


def _add_merge(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="merge an adapter into its base",
        description="Merge an adapter into its base, and write a plain model.",
    )
    _add_directories(parser)
    parser.add_argument("--method", help="merge by this method (qlora: into the dequantised weights)")
    parser.add_argument("--overwrite", action="store_true", help="replace what the output holds")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of the written weights (default: that of each in the base)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not load base and result, in float32, to compare their logits"
    )
    add_json(parser)
    parser.set_defaults(run=_merge, extra=EXTRA)


def _add_compress(commands: Any) -> None:
    parser = commands.add_parser(
        "compress",
        help="make a full fine-tuning's delta small",
        description="Write the changes of whole weights in a small form.",
    )
    _add_directories(parser)
    parser.add_argument(
        "--form",
        default="bitdelta",
        choices=("bitdelta", "svd"),
        help="one bit per weight, or low rank (default: %(default)s)",
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of svd (default: %(default)s)")
    add_json(parser)
    parser.set_defaults(run=_compress, extra=EXTRA)


def _add_compose(commands: Any) -> None:
    parser = commands.add_parser(
        "compose", help="make one adapter of several directories", description="Stack adapters, or add them up."
    )
    parser.add_argument("parts", nargs="+", metavar="DIR[=WEIGHT]", help="adapters, in the order in which they apply")
    parser.add_argument("--model", required=True, help=BASE)
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--mode",
        choices=("stack", "sum"),
        default="stack",
        help="one after the other, or their weighted sum (default: %(default)s)",
    )
    add_json(parser)
    parser.set_defaults(run=_compose, extra=EXTRA)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train, serve and swap adapters of three methods",
        description="Train adapters of three methods, serve them in one batch, and swap one while traffic runs.",
    )
    parser.add_argument("--model", help="another base: directory or Hugging Face id")
    parser.add_argument(
        "--output", type=path, default=Path("deltamux-demo"), help="directory to write (default: %(default)s)"
    )
    parser.add_argument("--steps-scale", type=float, default=1.0, help="train so many times as long")
    parser.set_defaults(run=_demo, extra="serve,train")


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn another library's adapter into one to upload",
        description="Write an adapter of AdapterHub's or MLX-LM's, or of PEFT's with adapter_model.bin, or with names "
        "that hold wrappers or the adapter's name, as one to upload.",
    )
    parser.add_argument("source", type=path, metavar="SRC", help="directory with adapter_config.json and the weights")
    parser.add_argument("destination", type=path, metavar="DEST", help="directory to write")
    parser.add_argument("--adapter-name", default="", metavar="NAME", help="which adapter, where names hold several")
    parser.add_argument("--model", default="", help="the base: the tensors are given its modules' names")
    parser.set_defaults(run=_convert, extra=EXTRA)


def _add_directories(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=BASE)
    parser.add_argument("--adapter", required=True, type=path, metavar="DIR", help="directory of an adapter")
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help="directory to write")


def _check_data(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import check_data

    limits = {"max_length": arguments.max_length, "turns": arguments.turns, "show": max(0, arguments.show)}
    report = check_data(arguments.model, arguments.data, **limits)
    if arguments.json:
        show_one(report, as_json=True)
        return
    show_one(replace(report, examples=()), as_json=False)
    for example in report.examples:
        print(f"\n{example}")


def _train(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import train

    config = read_config(arguments.config, arguments.set)
    options = TrainOptions(**given_options(arguments, TrainOptions), config=config)
    _show_result(lambda: train(options), arguments)


def _show_result(work: Callable[[], Any], arguments: argparse.Namespace) -> None:
    """Prints what the work returns; whatever is printed meanwhile goes to stderr: stdout is the result alone.

    SIGTERM ends the work as Ctrl-C does: what is half written is removed.
    """
    with redirect_stdout(sys.stderr), ended_by_sigterm():
        result = work()
    if int(os.environ.get("RANK", "0")) == 0:  # of several processes that torchrun started, the first
        show_one(result, as_json=arguments.json)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt during a block."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _evaluate(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import evaluate

    options = EvaluateOptions(**given_options(arguments, EvaluateOptions))
    _show_result(lambda: evaluate(options), arguments)


def _merge(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import merge

    options = {
        "method_name": arguments.method,
        "overwrite": arguments.overwrite,
        "dtype": arguments.dtype,
        "verify": not arguments.no_verify,
    }
    _show_result(lambda: merge(arguments.model, arguments.adapter, arguments.output, **options), arguments)


def _compress(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import compress

    options = {"form": arguments.form, "rank": arguments.rank}
    _show_result(lambda: compress(arguments.model, arguments.adapter, arguments.output, **options), arguments)


def _compose(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import compose_directories

    parts = [(Path(name), weight) for name, weight in map(weighted, arguments.parts)]
    _show_result(lambda: compose_directories(arguments.model, parts, arguments.output, mode=arguments.mode), arguments)


def _demo(arguments: argparse.Namespace) -> None:
    # Messages of libraries, some of which come as soon as they are imported, would drown what the demo shows.
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    from deltamux_trainers.demo.run import main

    main(arguments.model, arguments.output, arguments.steps_scale)


def _convert(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import convert

    names = {"adapter_name": arguments.adapter_name, "model": arguments.model}
    method = convert(arguments.source, arguments.destination, **names, note=print)
    print(f"{method} adapter written to {arguments.destination}")
