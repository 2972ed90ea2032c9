"""The processes of one engine: each ends with the one that started it, and none outlives the engine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil

from deltamux.child_process import block_signals_of_group, end_with_parent
from deltamux.engine.arguments import in_a_sentence
from deltamux.engine.vllm import fork_server

SHARED_MEMORY = "/dev/shm/psm_"
"""What the paths of `multiprocessing`'s shared memory begin with."""

GRACE_SECONDS = 0.1
"""For vLLM's processes to end by themselves, which those that block SIGTERM do not; they hold nothing to be closed."""

POLL_SECONDS = 0.1
GONE_SECONDS = 10.0
"""For a killed process to be gone: one in the middle of a system call ends after it."""


def family(pids: Collection[int]) -> list[psutil.Process]:
    """Returns the processes and all that they have started."""
    found: list[psutil.Process] = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    return found


def end(processes: Collection[psutil.Process]) -> list[int]:
    """Kills what still runs of the processes and waits until it is gone; returns the ids of those that are not."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()  # a process id that now belongs to another process counts as gone
    deadline = time.monotonic() + GONE_SECONDS
    while (left := [process.pid for process in processes if _holds_memory(process)]) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    multiprocessing.active_children()  # reads the exit statuses, which is all that remains of this process's own
    return left


def _holds_memory(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class EngineProcesses:
    """The processes of an engine that has started, and their shared memory.

    Args:
        pids: of those that have started all others.
    """

    def __init__(self, pids: Collection[int]) -> None:
        self._processes = family(pids)
        self._shared_memory = {file for process in self._processes for file in _shared_memory(process)}

    def stop(self, shutdown: Callable[[float], None]) -> list[int]:
        """Ends them; returns the ids of those that do not end.

        Args:
            shutdown: signals them to end by themselves, and waits for so many seconds.
        """
        shutdown(GRACE_SECONDS)
        left = end(self._processes)
        for file in self._shared_memory:  # what killed ones leave of it stays until this process ends
            with suppress(FileNotFoundError):
                file.unlink()
                resource_tracker.unregister(f"/{file.name}", "shared_memory")
        return left


def _shared_memory(process: psutil.Process) -> set[Path]:
    """Returns the files of the shared memory that a process has mapped; none outside Linux."""
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return set()
    return {Path(line[line.index(SHARED_MEMORY) :]) for line in maps.splitlines() if SHARED_MEMORY in line}


class Launch:
    """A start of vLLM that runs in a thread, and can be broken off: what it has started so far is killed.

    Attributes:
        result: of the thread.
    """

    def __init__(self, thread: Executor, work: Callable[[], Any]) -> None:
        self._others = {process.pid for process in multiprocessing.active_children()}
        self.result: Future[Any] = thread.submit(work)

    def break_off(self) -> None:
        """Waits until the thread has ended; one that still starts an engine ends with an error soon."""
        while not self.result.done():
            begun = {process.pid for process in multiprocessing.active_children()} - self._others
            end(family([pid for pid in begun if pid is not None]))
            fork_server.stop_idle()
            wait([self.result], timeout=POLL_SECONDS)


@contextmanager
def starting() -> Iterator[None]:
    """A block in which vLLM starts its processes as forks of the fork server, or spawns them where there is none.

    None is a fork of this process, whose open files it would share: clients' sockets would stay open after this
    process's end. All end with this one, from their first moment on. vLLM's own hooks run late in them: after the
    import of vLLM, a handshake that a killed server never ends, and the load of the model.
    """
    from vllm import envs

    # What a process is configured with is read before its target, and so before the import of vLLM.
    config: dict[str, object] = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # not in typeshed
    forked = fork_server.usable()
    config[_PARENT] = _Parent(forks=forked, generations=1)  # the engine's core, and its workers
    known = envs.environment_variables[_METHOD]
    # The variable itself takes two values only, and vLLM's CPU platform sets it.
    envs.environment_variables[_METHOD] = lambda: "forkserver" if forked else "spawn"
    try:
        yield
    finally:
        envs.environment_variables[_METHOD] = known
        del config[_PARENT]


START_ERRORS = "DELTAMUX_START_ERRORS"
"""The environment variable that names the file of `start_errors`."""


@contextmanager
def start_errors() -> Iterator[Callable[[], str | None]]:
    """A block in which processes that are started can report why they do not start; yields what returns the reason."""
    before = os.environ.get(START_ERRORS)
    with tempfile.TemporaryDirectory(prefix="deltamux-start-") as directory:
        file = Path(directory) / "error"
        os.environ[START_ERRORS] = str(file)
        try:
            yield lambda: file.read_text(encoding="utf-8") if file.exists() else None
        finally:
            del os.environ[START_ERRORS]
            if before is not None:
                os.environ[START_ERRORS] = before


def report_start_error(error: Exception) -> None:
    """Writes why a process that starts in a block of `start_errors` does not; the first report counts."""
    with suppress(KeyError, OSError), Path(os.environ[START_ERRORS]).open("x", encoding="utf-8") as file:
        file.write(in_a_sentence(error))


_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_PARENT = "deltamux.parent"
_forks_end_with: int | None = None  # this process, where its forks are to end with it


class _Parent:
    """What a process that another one starts has from it: when it unpickles this object, it comes to end with it.

    Args:
        forks: the process is a fork of the fork server; it takes the environment from the one that has started it.
        generations: of processes below it for which the same holds.
    """

    def __init__(self, *, forks: bool, generations: int) -> None:
        self._forks = forks
        self._generations = generations

    def __reduce__(self) -> tuple[Callable[..., _Parent | None], tuple[object, ...]]:
        if self._forks:
            return _read_in_fork, (fork_server.pid(), dict(os.environ))
        return _read, (os.getpid(), self._generations)


def _read(parent: int, generations: int) -> _Parent | None:
    end_with_parent(parent)
    block_signals_of_group()
    return _Parent(forks=False, generations=generations - 1) if generations else None


def _read_in_fork(server: int, environment: dict[str, str]) -> None:
    """Runs first in an engine's core. Its workers are forks of it."""
    global _forks_end_with
    end_with_parent(server)
    fork_server.detach()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    os.environ[_METHOD] = "fork"
    _forks_end_with = os.getpid()


def _forked() -> None:
    """Runs first in a fork of this process."""
    global _forks_end_with
    parent, _forks_end_with = _forks_end_with, None
    if parent is not None:
        end_with_parent(parent)


os.register_at_fork(after_in_child=_forked)
