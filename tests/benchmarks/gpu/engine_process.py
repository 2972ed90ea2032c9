"""Every engine in a process of its own, so that all are up at once and alternate: what drifts on the machine
drifts for all of them.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu.engines import ENGINES, Load, Started
from benchmarks.gpu.inputs import GPUInputs

CONTEXT = multiprocessing.get_context("spawn")


class EngineProcessError(Exception):
    """The engine's process has ended; what it printed says why."""


class EngineProcess:
    """An engine that starts at once, and then does one workload after the other as they are requested."""

    def __init__(self, name: str, inputs: GPUInputs, load: Load) -> None:
        self.name = name
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_run, args=(name, inputs, load, theirs))
        self._process.start()
        theirs.close()

    def workloads(self) -> list[str]:
        """Waits until the engine takes requests, and returns what it can be loaded with.

        Raises:
            EngineProcessError: it has not started.
        """
        workloads: list[str] = self._answer()
        return workloads

    def tokens_per_second(self, workload: str, repeat: int) -> float:
        """Runs a workload once; no two rounds have the same prompts.

        Raises:
            EngineProcessError: the engine has ended.
        """
        self._pipe.send((workload, repeat))
        figure: float = self._answer()
        return figure

    def close(self) -> None:
        """Ends the engine, and returns when its processes are gone."""
        with suppress(OSError):  # it has ended by itself
            self._pipe.send(None)
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise EngineProcessError(f"the engine {self.name!r} has ended: see what it printed above") from None


def _run(name: str, inputs: GPUInputs, load: Load, pipe: Connection) -> None:
    asyncio.run(_serve(name, inputs, load, pipe))


async def _serve(name: str, inputs: GPUInputs, load: Load, pipe: Connection) -> None:
    async with ENGINES[name](inputs, load) as started:
        pipe.send(list(started.workloads))
        while (order := await asyncio.to_thread(pipe.recv)) is not None:
            workload, repeat = order
            pipe.send(await _once(started, load, workload, f"{name}-{repeat}-{workload}"))


async def _once(started: Started, load: Load, workload: str, tag: str) -> float:
    adapters = started.workloads[workload]
    began = time.perf_counter()
    await asyncio.gather(
        *(
            started.generate(_prompt(tag, i, load.prompt_tokens), adapters[i % len(adapters)], f"{tag}-{i}")
            for i in range(load.sequences)
        )
    )
    return load.sequences * load.new_tokens / (time.perf_counter() - began)


def _prompt(tag: str, index: int, length: int) -> tuple[int, ...]:
    """Returns token ids that no other request has, so that no prefix cache answers."""
    start = sum(tag.encode()) + 7919 * index
    return tuple(3 + (start + 104_729 * k) % 30_000 for k in range(length))
