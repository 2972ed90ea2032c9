"""A CPU worker whose steps run as CUDA graphs would replay them: from the launches that were captured, by the table."""

from __future__ import annotations

from collections import Counter
from typing import Any

from deltamux.engine.vllm.cpu_worker import CPUDeltaWorker
from deltamux.engine.vllm.kernel_manager import CapturedStep, KernelDeltaManager


class _ReplayingRunnerMixin:
    """After a step was made active, keeps nothing of it but what a graph has: its profile and its table."""

    lora_manager: KernelDeltaManager
    replayed: Counter[str]

    def set_active_loras(self, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        super().set_active_loras(input_batch, num_scheduled_tokens, *args, **kwargs)  # type: ignore[misc]  # the runner
        manager, profile = self.lora_manager, self.lora_manager.profile()
        self.replayed["none" if profile is None else profile.name] += 1
        if profile:
            rows = int(num_scheduled_tokens.sum())
            last_rows = manager.current.index.last_rows
            manager.current.begin(CapturedStep(profile, rows, manager.table, last_rows))


class ReplayingWorker(CPUDeltaWorker):
    """See the module."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        runner.__class__ = type("ReplayingRunner", (_ReplayingRunnerMixin, type(runner)), {})
        runner.replayed = Counter()

    def replayed(self) -> dict[str, int]:
        """Returns how many steps ran by each profile."""
        return dict(self.model_runner.replayed)
