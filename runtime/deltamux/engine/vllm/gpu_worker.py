"""The worker for CUDA devices."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from deltamux.engine.vllm import graphs, opaque
from deltamux.engine.vllm.worker import DeltaWorkerMixin


class GPUDeltaWorker(DeltaWorkerMixin, Worker):
    """vLLM's CUDA worker, with deltas."""

    def init_device(self) -> None:
        super().init_device()
        opaque.trace_by_name(True)
        graphs.install(self.model_runner)
