"""`deltamux train`, `evaluate`, `merge` and `demo`: what runs on this machine, without a server."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from deltamux.cli.output import add_json, show_one
from deltamux.cli.paths import path

TRAIN_NUMBERS: dict[str, tuple[type, str]] = {
    "epochs": (float, "passes over the data"),
    "max_steps": (int, "optimizer steps, instead of epochs"),
    "batch_size": (int, "rows a micro-batch"),
    "gradient_accumulation": (int, "micro-batches an optimizer step"),
    "learning_rate": (float, "default: the method's own, for the base's width"),
    "weight_decay": (float, ""),
    "warmup_ratio": (float, "share of the steps"),
    "max_length": (int, "tokens per row; longer ones are cut"),
    "eval_fraction": (float, "share of the data to hold out, where --eval-data is not given"),
    "eval_steps": (int, "optimizer steps between evaluations (default: once per pass)"),
    "save_steps": (int, "optimizer steps between checkpoints; the last two are kept (default: once per pass)"),
    "patience": (int, "evaluations without improvement after which training stops"),
    "log_steps": (int, "optimizer steps between log lines"),
    "seed": (int, ""),
}


def add_commands(commands: Any) -> None:
    _add_train(commands)
    _add_evaluate(commands)
    _add_merge(commands)
    _add_compress(commands)
    _add_compose(commands)
    demo = commands.add_parser("demo", help="train, serve and swap adapters of three methods")
    demo.add_argument("--model", help="another base: directory or Hugging Face id")
    demo.add_argument("--output", help="folder for everything made here (default: deltamux-demo)")
    demo.add_argument("--steps-scale", help="train so many times as long")
    demo.set_defaults(run=_demo)


def _add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train an adapter", description="Train an adapter of any method.")
    parser.add_argument("--method", required=True, help="see `deltamux methods`")
    _add_base(parser)
    parser.add_argument(
        "--data", required=True, type=path, metavar="F.jsonl", help="text, prompt+completion or messages"
    )
    parser.add_argument("--output", required=True, type=path, metavar="DIR")
    parser.add_argument("--eval-data", type=path, metavar="F.jsonl")
    parser.add_argument("--config", type=path, metavar="F.yaml", help="the method's options")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one option of the method")
    for name, (kind, text) in TRAIN_NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    _add_turns(parser)
    parser.add_argument("--optimizer", help="adamw (default), adamw_8bit or paged_adamw_8bit (both need bitsandbytes)")
    parser.add_argument("--scheduler", help="learning-rate schedule (default: linear)")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint, exactly")
    add_json(parser)
    parser.set_defaults(run=_train)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate", help="evaluate a base or an adapter", description="Evaluate without a server."
    )
    _add_base(parser)
    parser.add_argument("--data", required=True, type=path, metavar="F.jsonl")
    parser.add_argument("--adapter", type=path, metavar="DIR", help="the base alone without it")
    parser.add_argument("--generate", action="store_true", help="count exact matches of greedy answers, too")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens per row; more are cut (%(default)s)")
    _add_turns(parser)
    parser.add_argument("--limit", type=int, help="rows to look at")
    add_json(parser)
    parser.set_defaults(run=_evaluate)


def _add_merge(commands: Any) -> None:
    parser = commands.add_parser("merge", help="fold an adapter into its base", description="Write a plain model.")
    parser.add_argument("--model", required=True, help="directory or Hugging Face id of the base")
    parser.add_argument("--adapter", required=True, type=path, metavar="DIR")
    parser.add_argument("--output", required=True, type=path, metavar="DIR")
    parser.add_argument("--method", help="merge by this method (qlora: into the dequantised weights)")
    parser.add_argument("--overwrite", action="store_true", help="replace what the output holds")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the written weights (default: that of each in the base)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not load base and result, in float32, to compare their logits"
    )
    add_json(parser)
    parser.set_defaults(run=_merge)


def _add_compress(commands: Any) -> None:
    parser = commands.add_parser(
        "compress", help="make a full fine-tuning's delta small", description="Compress changes of whole weights."
    )
    parser.add_argument("--model", required=True, help="directory or Hugging Face id of the base")
    parser.add_argument("--adapter", required=True, type=path, metavar="DIR")
    parser.add_argument("--output", required=True, type=path, metavar="DIR")
    parser.add_argument("--form", default="bitdelta", choices=("bitdelta", "svd"), help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=16, help="of svd (default: %(default)s)")
    add_json(parser)
    parser.set_defaults(run=_compress)


def _add_compose(commands: Any) -> None:
    parser = commands.add_parser(
        "compose", help="make one adapter of several directories", description="Stack adapters, or add them up."
    )
    parser.add_argument("parts", nargs="+", metavar="DIR[=WEIGHT]", help="adapters, in the order in which they apply")
    parser.add_argument("--model", required=True, help="directory or Hugging Face id of the base")
    parser.add_argument("--output", required=True, type=path, metavar="DIR")
    parser.add_argument("--mode", choices=("stack", "sum"), default="stack", help="default: %(default)s")
    add_json(parser)
    parser.set_defaults(run=_compose)


def _add_turns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--turns", choices=("all", "last"), default="all", help="the assistant's turns that are learnt (%(default)s)"
    )


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="directory or Hugging Face id of the base")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def _train(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import TrainOptions, read_config, train

    given = {
        name: getattr(arguments, name) for name in (*TRAIN_NUMBERS, "optimizer", "scheduler", "eval_data", "turns")
    }
    options = TrainOptions(
        method=arguments.method,
        model=arguments.model,
        data=arguments.data,
        output=arguments.output,
        config=read_config(arguments.config, arguments.set),
        dtype=arguments.dtype,
        device=arguments.device,
        resume=arguments.resume,
        **{name: value for name, value in given.items() if value is not None},
    )
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
    """Has SIGTERM raise KeyboardInterrupt for the length of a block."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _evaluate(arguments: argparse.Namespace) -> None:
    from deltamux_trainers import EvaluateOptions, evaluate

    names = ("model", "data", "adapter", "generate", "max_new_tokens", "batch_size", "max_length", "turns", "limit")
    given = {name: getattr(arguments, name) for name in (*names, "dtype", "device")}
    options = EvaluateOptions(**given)
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
    from deltamux.cli.adapters import weighted
    from deltamux_trainers import compose_directories

    parts = [(Path(name), weight) for name, weight in map(weighted, arguments.parts)]
    _show_result(lambda: compose_directories(arguments.model, parts, arguments.output, mode=arguments.mode), arguments)


def _demo(arguments: argparse.Namespace) -> None:
    # What libraries say of themselves, some as soon as they are imported, would drown what the demo has to show.
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    from deltamux_trainers.demo.run import main

    given = {"--model": arguments.model, "--output": arguments.output, "--steps-scale": arguments.steps_scale}
    main([part for flag, value in given.items() if value is not None for part in (flag, value)])
