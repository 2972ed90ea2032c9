"""The process that runs plugins: it imports them, and compiles uploads by their hooks. `compiler.py` is its other side.

Nothing of the server imports this module. It is run as ``python -m`` by the server, with the number of an open socket;
it sends there what it is about to run, so that its end or its silence names the plugin.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from deltamux.child_process import become_helper
from deltamux.deltas import BaseModel, Checkpoint, Program
from deltamux.deltas.batched_check import check_batched
from deltamux.errors import BudgetExceededError, DeltamuxError, InvalidAdapterError, PluginError
from deltamux.registry import Method, Registry, create_plugin_manager
from deltamux.server.compiling.job import MAX_TEXT, Budgets, Compiled, Job, error_message, unpacked
from deltamux.server.compiling.memory import COMPILING, COPIES, READING, at_most, is_shortage
from deltamux.store import PROGRAM_FILE
from deltamux.store.faults import FULL, store_error

MAX_GROWTH = 1 << 30
"""Bytes of memory, beyond those after the start, at which the process is replaced: some plugin leaks."""


def main() -> None:
    """Serves jobs from the socket until it is closed."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    become_helper(parent)
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as channel:
        CompilerChild(channel).run()  # type: ignore[arg-type]  # makefile's type is narrower than a binary file's


class CompilerChild:
    """Reads plugins once, then compiles one job after the other."""

    def __init__(self, channel: BinaryIO) -> None:
        self._channel = channel
        self._registry: Registry

    def run(self) -> None:
        start = json.loads(self._channel.readline())
        self._registry = Registry(create_plugin_manager(skip=start["skip"], on_step=self._on_step))
        self._send({"methods": self._registry.names(), "broken": self._registry.broken})
        before = _own_bytes()
        while line := self._channel.readline():
            answer = self._answer(Job.of(json.loads(line)))
            self._send(answer | {"leaks": _own_bytes() - before > MAX_GROWTH})

    def _answer(self, job: Job) -> dict[str, Any]:
        try:
            with torch.no_grad(), at_most(COMPILING + COPIES * job.budgets.max_bytes):
                return {"compiled": vars(self._compile(job))}
        except Exception as error:
            if is_shortage(error):
                return {"error": error_message(_too_large(error))}
            if isinstance(error, DeltamuxError):
                return {"error": error_message(error)}
            fault = store_error(error, job.staged.parent.parent)
            if fault is not None and fault.reason == FULL:  # others may be of files of the plugin's
                return {"error": error_message(fault)}
            return {"unexpected": traceback.format_exc()[-MAX_TEXT:]}

    def _compile(self, job: Job) -> Compiled:
        base = unpacked(job.base)
        with at_most(READING + sum(file.stat().st_size for file in job.staged.iterdir())):
            checkpoint = Checkpoint.read(job.staged)
        method, checkpoint = self._registry.recognise(checkpoint)
        if job.announced and method is not self._registry.get(job.announced):
            raise InvalidAdapterError(
                f"the upload is announced as {job.announced!r}, but its files are of method {method.name!r}",
                reason="METHOD_MISMATCH",
                metadata={"method": method.name},
            )
        return self._save(method, method.load(checkpoint, base).program, job, base)

    def _save(self, method: Method, program: Program, job: Job, base: BaseModel) -> Compiled:
        """Writes the program, and checks it as the engine will read it: with no code of the plugin's in between."""
        path = job.staged / PROGRAM_FILE
        try:
            _check_budgets(program, job.budgets)
            program.save(path, base_fingerprint=base.fingerprint)
            written = Program.load(path)
        except (BudgetExceededError, OSError):
            raise
        except SafetensorError as error:
            raise _disk_error(error) from error
        except Exception as error:
            what = f"{type(error).__name__}: {error}".replace(f"{job.staged}{os.sep}", "")
            problem = f"plugin {method.name!r} made a program that cannot be kept: {what}"
            raise PluginError(problem, metadata={"plugin": method.name, "hook": "deltamux_program"}) from error
        placed = written.placed(base)
        written.check_finite()
        self._on_step(method.name, "the check of its batched ops")
        check_batched(placed)
        _check_budgets(written, job.budgets)
        return Compiled(method.name, written.rank(), written.num_virtual_tokens, written.num_bytes())

    def _on_step(self, plugin: str, step: str) -> None:
        self._send({"plugin": plugin, "step": step})

    def _send(self, message: dict[str, Any]) -> None:
        self._channel.write(json.dumps(message).encode() + b"\n")
        self._channel.flush()


def _too_large(error: Exception) -> BudgetExceededError:
    known = error.metadata if isinstance(error, DeltamuxError) else {}
    return BudgetExceededError(
        "compiling the adapter takes more memory than this server gives one adapter: make it smaller, or start the "
        "server with a greater --max-adapter-bytes",
        reason="COMPILE_MEMORY",
        metadata=known,
    )


def _disk_error(error: SafetensorError) -> Exception:
    """Returns what the disk said to safetensors, which has only its number in words; else the error itself."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), str(error)) if found else error


def _check_budgets(program: Program, budgets: Budgets) -> None:
    needs = {
        "rank": (program.rank(), budgets.max_rank),
        "virtual tokens": (program.num_virtual_tokens, budgets.max_virtual_tokens),
        "bytes": (program.num_bytes(), budgets.max_bytes),
    }
    for what, (needed, limit) in needs.items():
        if needed > limit:
            raise BudgetExceededError(
                f"the adapter needs {needed} {what}; this server gives one adapter at most {limit}",
                metadata={"budget": what, "needed": str(needed), "limit": str(limit)},
            )


def _own_bytes() -> int:
    """Returns how much memory this process holds; pages of mapped files, such as the base's weights, do not count."""
    if sys.platform != "linux":
        return 0
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
