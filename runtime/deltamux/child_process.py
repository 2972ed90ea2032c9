"""Helper processes: how one starts, and its first steps. Both ends send JSON objects, one per line, over a socket."""

import asyncio
import ctypes
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

PR_SET_PDEATHSIG = 1
NICE = 10
"""Of ten ticks of a core that the engine could use, a helper takes one.

Linux's SCHED_IDLE would cost the engine less, since its threads would not wait for the end of a helper's slice when
they wake up; but a helper would not run at all while other threads never sleep, nor may it leave that policy again.
"""


def end_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends in any way. Does nothing outside Linux.

    The signal comes when the *thread* that started this process ends, so that thread must live as long as the parent.

    Args:
        parent: process id of the parent; if it has ended already, this process exits at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def block_signals_of_group() -> None:
    """Makes SIGINT and SIGTERM wait for ever, in this process and in its forks, whatever handlers they come to have.

    A terminal's Ctrl-C and a service manager's stop reach every process; the server alone decides when others end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def become_helper(parent: int) -> None:
    """Makes this process a helper of its parent: it ends with it, and yields CPU and memory to it and to the engine.

    Signals of a terminal are ignored, since the parent decides when its helper ends. What is printed goes to standard
    error, since standard output is the parent's.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.nice(NICE)
    with suppress(OSError):  # outside Linux there is none, and it may be read-only
        # Where memory runs out, the kernel is to end this process, and not the engine's.
        Path("/proc/self/oom_score_adj").write_text("1000")
    end_with_parent(parent)


class HelperProcess(NamedTuple):
    """A helper, and the socket to it."""

    process: Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, message: dict[str, Any]) -> None:
        """Queues a message; one to a helper that has gone is dropped."""
        if not self.writer.is_closing():
            self.writer.write(json.dumps(message).encode() + b"\n")

    def kill(self) -> None:
        """Ends the helper and what it has started, at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


async def start_helper(module: str, max_line: int, **environment: str) -> HelperProcess:
    """Starts ``python -m module DESCRIPTOR PARENT``, which calls `become_helper` first.

    Call it from the thread that lives as long as this process, with which the helper ends.

    Args:
        max_line: bytes of a line that the helper may send.
        environment: variables added to this process's. The helper has this process's import path, and no GPU.
    Raises:
        OSError: it cannot be started.
    """
    ours, theirs = socket.socketpair()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with theirs:
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=max_line)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())),
                stdin=DEVNULL,
                pass_fds=[theirs.fileno()],
                # A group of its own: a terminal's Ctrl-C is the parent's, and what the helper starts ends with it.
                # No session of its own, which Linux would give another share of the CPUs than the parent's.
                process_group=0,
                env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **environment},
            )
        except BaseException:
            writer.close()
            raise
    return HelperProcess(process, reader, writer)
