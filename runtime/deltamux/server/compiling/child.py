"""The process that runs plugins: it imports them and compiles uploads with their hooks; see `compiler.py`.

No module of the server imports this one: the server runs it with ``python -m`` and an open socket's descriptor. Each
phase is announced on the socket before it begins, so that a crash or a timeout can be traced to its plugin.
"""

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
from deltamux.server.compiling.job import MAX_TEXT, Budgets, Compiled, Job, decode_base, encode_error
from deltamux.server.compiling.memory import COMPILING, COPIES, READING, is_out_of_memory, limit_memory
from deltamux.store import PROGRAM_FILE
from deltamux.store.faults import FULL, store_error

MAX_GROWTH = 1 << 30
"""Bytes of memory beyond those after start-up at which the process is replaced, as a plugin leaks."""


def main() -> None:
    """Runs jobs from the socket until it is closed."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    become_helper(parent)
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as channel:
        CompilerChild(channel).run()  # type: ignore[arg-type]  # makefile's type is narrower than a binary file's


class CompilerChild:
    """The compiler: it imports plugins once, then runs one job after the other."""

    def __init__(self, channel: BinaryIO) -> None:
        self._channel = channel
        self._registry: Registry

    def run(self) -> None:
        start = json.loads(self._channel.readline())
        self._registry = Registry(create_plugin_manager(skip=start["skip"], on_phase=self._on_phase))
        self._send({"methods": self._registry.names(), "broken": self._registry.broken})
        before = _own_bytes()
        while line := self._channel.readline():
            message = json.loads(line)
            fits = "fits" in message
            answer = self._fit(**message) if fits else self._answer(Job.from_message(message))
            self._send(answer | {"leaks": _own_bytes() - before > MAX_GROWTH})

    def _answer(self, job: Job) -> dict[str, Any]:
        try:
            with torch.no_grad(), limit_memory(COMPILING + COPIES * job.budgets.max_bytes):
                return {"compiled": vars(self._compile(job))}
        except Exception as error:
            if is_out_of_memory(error):
                return {"error": encode_error(_too_large(error))}
            if isinstance(error, DeltamuxError):
                return {"error": encode_error(error)}
            fault = store_error(error, job.staged.parent.parent)
            if fault is not None and fault.reason == FULL:  # other faults may be of the plugin's own files
                return {"error": encode_error(fault)}
            return {"unexpected": traceback.format_exc()[-MAX_TEXT:]}

    def _fit(self, fits: str, base: str) -> dict[str, Any]:
        described, support = decode_base(base)
        assert support is not None, "the server asks once its engine has started"
        try:
            method = self._registry.get(fits)
            if not method.info.trains:
                return {"refusal": None}
            with torch.no_grad(), limit_memory(COMPILING):
                support.check(fresh_program(method, support.representative(described)))
        except Exception as error:
            if is_out_of_memory(error):
                return {"refusal": "it takes more memory to find out than a plugin may use"}
            if isinstance(error, DeltamuxError):
                return {"refusal": error.message[:MAX_TEXT]}
            return {"refusal": f"its adapters cannot be made: {type(error).__name__}: {error}"[:MAX_TEXT]}
        return {"refusal": ""}

    def _compile(self, job: Job) -> Compiled:
        base, support = decode_base(job.base)
        with limit_memory(READING + sum(file.stat().st_size for file in job.staged.iterdir())):
            checkpoint = Checkpoint.read(job.staged)
        method, checkpoint = self._registry.recognise(checkpoint)
        if job.expected_method and method is not self._registry.get(job.expected_method):
            raise InvalidAdapterError(
                f"the upload is declared as {job.expected_method!r}, but its files are of method {method.name!r}",
                reason="METHOD_MISMATCH",
                metadata={"method": method.name},
            )
        loaded = method.load(checkpoint, base, check_values=False)  # they are checked as they are written
        if support is not None:
            support.check(loaded.program)
        return self._save(method, loaded.program, job, base)

    def _save(self, method: Method, program: Program, job: Job, base: BaseModel) -> Compiled:
        """Writes the program, and checks the written file, as the engine reads it."""
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
        self._on_phase(method.name, "the check of its batched ops")
        check_batched(placed)
        _check_budgets(written, job.budgets)
        return Compiled(method.name, written.rank(), written.num_virtual_tokens, written.num_bytes())

    def _on_phase(self, plugin: str, phase: str) -> None:
        self._send({"plugin": plugin, "phase": phase})

    def _send(self, message: dict[str, Any]) -> None:
        self._channel.write(json.dumps(message).encode() + b"\n")
        self._channel.flush()


def fresh_program(method: Method, base: BaseModel) -> Program:
    """Returns the program of a method's adapter as configured by default, all parameters zero, which take no memory."""
    config = method.parse({})
    declared = method.parameters(config, base)
    parameters = {name: torch.zeros(()).expand(spec.shape) for name, spec in declared.items()}
    return method.program(config, base, method.export(config, base, parameters))


def _too_large(error: Exception) -> BudgetExceededError:
    known = error.metadata if isinstance(error, DeltamuxError) else {}
    return BudgetExceededError(
        "compiling the adapter takes more memory than this server allows one adapter: make it smaller, or start the "
        "server with a larger --max-adapter-bytes",
        reason="COMPILE_MEMORY",
        metadata=known,
    )


def _disk_error(error: SafetensorError) -> Exception:
    """Returns the OSError whose number is in the text of a safetensors error; else the error itself."""
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
                f"the adapter needs {needed} {what}; this server allows one adapter at most {limit}",
                metadata={"budget": what, "needed": str(needed), "limit": str(limit)},
            )


def _own_bytes() -> int:
    """Returns this process's resident memory without mapped files, such as the base's weights."""
    if sys.platform != "linux":
        return 0
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
