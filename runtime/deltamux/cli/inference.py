"""`deltamux generate`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from deltamux.cli.connect import add_connection, connect
from deltamux.cli.options import add_options, given_options
from deltamux.cli.output import add_json, plain
from deltamux.options import declared


def add_commands(commands: Any) -> None:
    from deltamux.engine.base import SamplingOptions

    parser = commands.add_parser(
        "generate", help="generate text", description="Generate text; tokens stream as they come."
    )
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    parser.add_argument("--adapter", metavar="NAME", help="tenants/T/adapters/A[/versions/N]; the base without it")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated")
    parser.add_argument("--choice", action="append", default=[], metavar="TEXT", help="answer one of these; repeat it")
    parser.add_argument("--json-schema", type=Path, metavar="FILE", help="answer JSON of this schema")
    parser.add_argument("--regex", metavar="PATTERN", help="answer what this regular expression matches")
    add_options(parser, SamplingOptions)
    parser.set_defaults(**dict.fromkeys(declared(SamplingOptions)))  # what is not given is left to the server
    add_json(parser)
    add_connection(parser)
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    from deltamux.engine.base import SamplingOptions

    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt = [{"role": "user", "content": text}] if arguments.chat else text
    sampling = {**given_options(arguments, SamplingOptions), "regex": arguments.regex}
    sampling["stop"] = arguments.stop or None
    sampling["choice"] = arguments.choice or None
    sampling["json_schema"] = arguments.json_schema.read_text() if arguments.json_schema else None
    with connect(arguments) as client:
        if arguments.json:
            whole = client.generate(prompt, adapter=arguments.adapter, **sampling)
            print(json.dumps(plain(whole), indent=2))
            return
        for chunk in client.generate_stream(prompt, adapter=arguments.adapter, **sampling):
            print(chunk.text, end="", flush=True)
    print()
