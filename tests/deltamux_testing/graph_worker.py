"""The CUDA worker, which counts what its steps replay."""

from __future__ import annotations

from collections import Counter
from typing import Any

from deltamux.engine.vllm.cuda.profiles import GraphProfile
from deltamux.engine.vllm.cuda.worker import GPUDeltaWorker


class _CountingRunnerMixin:
    replayed: Counter[str]

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        chosen = super()._determine_batch_execution_and_padding(*args, **kwargs)  # type: ignore[misc]  # the runner
        if kwargs.get("force_num_active_loras") is None:  # a step of requests, and none of vLLM's own
            mode, batch = chosen[:2]
            self.replayed[f"{mode.name} {GraphProfile(batch.num_active_loras).name}" if mode.value else "none"] += 1
        return chosen


class CountingWorker(GPUDeltaWorker):
    """See the module."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        runner.__class__ = type("CountingRunner", (_CountingRunnerMixin, type(runner)), {})
        runner.replayed = Counter()

    def replayed(self) -> dict[str, int]:
        """Returns how many steps ran by a graph of each mode and profile, and how many by none."""
        return dict(self.model_runner.replayed)
