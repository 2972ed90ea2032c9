"""The process that tries grammars before the engine gets them. `grammars.py` is its other side.

It is run as ``python -m`` with the number of an open socket, reads its settings and then jobs as JSON lines, and forks
a process for each job, which the kernel ends at the job's CPU time or memory. So a grammar can take along no more than
its own job, and the next job finds everything imported.
"""

import json
import os
import random
import re
import resource
import selectors
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xgrammar

from deltamux.child_process import become_helper

WALKS, STEPS = 4, 32
"""Texts that a grammar is tried with, and tokens of each."""

PREFIX = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: (?:Check failed: )?(?:Warning: )?")
"""Time and place at the start of xgrammar's messages."""

HARMLESS = re.compile(r"Escape sequence '\\[^0-9A-Za-z]' is not recognized")
"""The one warning about nothing ignored: such an escape is the character itself in every dialect."""


def main() -> None:
    """Runs jobs from the socket until it is closed."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    become_helper(parent)
    torch.set_num_threads(1)
    with socket.socket(fileno=descriptor) as connection:
        GrammarCompiler(connection).run()


class GrammarCompiler:
    """Forks a process for each job, and sends its result."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._selector = selectors.DefaultSelector()
        self._pids: dict[int, int] = {}
        self._settings: dict[str, Any] = json.loads(self._lines.readline())
        self._tokenizer = xgrammar.TokenizerInfo.deserialize_json(self._settings.pop("tokenizer"))

    def run(self) -> None:
        self._send({"ready": True})
        self._selector.register(self._connection, selectors.EVENT_READ)
        buffer = b""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._connection:
                    self._finish(key.fd, key.data)
                    continue
                received = self._connection.recv(1 << 16)
                if not received:
                    return
                *lines, buffer = (buffer + received).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if "cancel" in message:
            if pid := self._pids.get(message["cancel"]):
                os.kill(pid, signal.SIGKILL)
            return
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _run_job(self._tokenizer, self._settings, message, writer)
        os.close(writer)
        self._pids[message["id"]] = pid
        self._selector.register(reader, selectors.EVENT_READ, message["id"])

    def _finish(self, reader: int, job: int) -> None:
        """Reads a job's answer, which fits into a pipe, at its end."""
        answer = os.read(reader, 1 << 16)
        self._selector.unregister(reader)
        os.close(reader)
        os.waitpid(self._pids.pop(job), 0)
        self._send({"id": job} | (json.loads(answer) if answer.endswith(b"}") else {"ended": True}))

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")


def _run_job(tokenizer: xgrammar.TokenizerInfo, settings: dict[str, Any], job: dict[str, Any], writer: int) -> None:
    """Runs in the job's own process, and ends it."""
    try:
        warnings = tempfile.TemporaryFile()  # noqa: SIM115 - the process ends
        os.dup2(warnings.fileno(), sys.stderr.fileno())
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = _data_bytes() + job["memory_bytes"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        problem = _problem(tokenizer, settings, job) or _ignored(os.pread(warnings.fileno(), 1 << 16, 0))
    except Exception as error:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            os._exit(1)
        text = PREFIX.sub("", str(error)).strip() or type(error).__name__
        problem = f"cannot be used: {text.splitlines()[0][:300]}"
    with suppress(BaseException):
        os.write(writer, json.dumps({"problem": problem}).encode())
    os._exit(0)


def _ignored(warnings: bytes) -> str | None:
    """Returns the first of xgrammar's warnings: each is about a part of the grammar that it leaves out, or loosens."""
    for line in warnings.decode("utf-8", "replace").splitlines():
        if "Warning: " in line and not HARMLESS.search(line):
            return f"cannot be held to as it is written: {PREFIX.sub('', line)[:300]}"
    return None


def _problem(tokenizer: xgrammar.TokenizerInfo, settings: dict[str, Any], job: dict[str, Any]) -> str | None:
    """Returns what is wrong with a grammar; None if the engine may have it."""
    compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)
    text: str = job["text"]
    if job["kind"] == "json":
        compiled = compiler.compile_json_schema(
            text, any_whitespace=settings["any_whitespace"], separators=settings["separators"]
        )
    elif job["kind"] == "regex":
        compiled = compiler.compile_regex(text)
    else:
        compiled = compiler.compile_grammar(text)
    if compiled.memory_size_bytes > job["grammar_bytes"]:
        limit = job["grammar_bytes"]
        return f"compiles to {compiled.memory_size_bytes} bytes; at most {limit} are taken: simplify it"
    bitmask = xgrammar.allocate_token_bitmask(1, tokenizer.vocab_size)
    for seed in range(WALKS):
        if problem := _walk(compiled, tokenizer, bitmask, job["step_seconds"], seed):
            return problem
    return None


def _walk(
    compiled: xgrammar.CompiledGrammar,
    tokenizer: xgrammar.TokenizerInfo,
    bitmask: torch.Tensor,
    step_seconds: float,
    seed: int,
) -> str | None:
    """Follows a grammar along one of its texts, as the engine does, which fills a mask in each step."""
    choose, matcher = random.Random(seed), xgrammar.GrammarMatcher(compiled)
    stops, slow = set(tokenizer.stop_token_ids), 0
    for step in range(STEPS):
        started = time.thread_time()
        matcher.fill_next_token_bitmask(bitmask)
        slow += time.thread_time() - started > step_seconds
        if slow > 1:  # one may be the machine's load
            return f"takes more than {step_seconds * 1000:g} ms per token to follow: simplify it"
        bits = np.unpackbits(bitmask[0].numpy().view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        allowed = np.flatnonzero(bits)
        if not len(allowed):
            return "matches no text of the base's vocabulary" if step == 0 else "leads where no token may follow"
        tries = (int(allowed[choose.randrange(len(allowed))]) for _ in range(8))
        matcher.accept_token(next((token for token in tries if token not in stops), int(allowed[0])))
        if matcher.is_terminated():
            return None
    return None


def _data_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
