"""A CPU worker whose steps run as CUDA graphs would replay them, by the launches that were captured."""

from __future__ import annotations

from collections import Counter
from typing import Any

from deltamux.engine.vllm.cuda.backend import CapturedStep, CudaBackend
from deltamux.engine.vllm.cuda.worker import InterpretedDeltaWorker
from deltamux.engine.vllm.worker.manager import DeltaManager


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


class ReplayingWorker(InterpretedDeltaWorker):
    """See the module."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        runner.__class__ = type("ReplayingRunner", (_ReplayingRunnerMixin, type(runner)), {})
        runner.replayed = Counter()

    def replayed(self) -> dict[str, int]:
        """Returns how many steps ran by each profile."""
        return dict(self.model_runner.replayed)
