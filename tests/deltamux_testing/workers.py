"""Workers for CUDA's runner, which count the graphs that their steps replay."""

from __future__ import annotations

from collections import Counter
from typing import Any

from deltamux.engine.vllm.cuda.backend import CapturedStep, CudaBackend
from deltamux.engine.vllm.cuda.profiles import GraphProfile
from deltamux.engine.vllm.cuda.worker import GPUDeltaWorker, InterpretedDeltaWorker
from deltamux.engine.vllm.worker.manager import DeltaManager


class _CountingRunnerMixin:
    """Counts the steps by the mode and the profile of their graph."""

    replayed: Counter[str]

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        chosen = super()._determine_batch_execution_and_padding(*args, **kwargs)  # type: ignore[misc]  # the runner
        if kwargs.get("force_num_active_loras") is None:  # a step of requests, and none of vLLM's own
            mode, batch = chosen[:2]
            self.replayed[f"{mode.name} {GraphProfile(batch.num_active_loras).name}" if mode.value else "none"] += 1
        return chosen


class _ReplayingRunnerMixin:
    """After a step was made active, keeps nothing of it but what a graph has: its profile and its records."""

    lora_manager: DeltaManager
    replayed: Counter[str]

    def set_active_loras(self, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        super().set_active_loras(input_batch, num_scheduled_tokens, *args, **kwargs)  # type: ignore[misc]  # the runner
        backend = self.lora_manager.backend
        assert isinstance(backend, CudaBackend)
        profile = backend.profile()
        self.replayed["none" if profile is None else profile.name] += 1
        if profile:
            rows = int(num_scheduled_tokens.sum())
            last_rows = backend.current.index.last_rows
            backend.current.begin(CapturedStep(profile, rows, backend.records, last_rows))


class _CountingWorkerMixin:
    model_runner: Any
    runner_mixin: type

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]  # the worker
        runner = self.model_runner
        runner.__class__ = type("CountingRunner", (self.runner_mixin, type(runner)), {})
        runner.replayed = Counter()

    def replayed(self) -> dict[str, int]:
        """Returns how many steps ran by each graph, and how many by none."""
        return dict(self.model_runner.replayed)


class CountingWorker(_CountingWorkerMixin, GPUDeltaWorker):
    """The CUDA worker."""

    runner_mixin = _CountingRunnerMixin


class ReplayingWorker(_CountingWorkerMixin, InterpretedDeltaWorker):
    """A CPU worker whose steps run as CUDA graphs would replay them, by the launches that were captured."""

    runner_mixin = _ReplayingRunnerMixin
