"""The worker for CPUs."""

from vllm.v1.worker.cpu_worker import CPUWorker

from deltamux.engine.vllm.worker.backend import CPUBackend
from deltamux.engine.vllm.worker.worker import DeltaWorkerMixin


class CPUDeltaWorker(DeltaWorkerMixin, CPUWorker):
    """vLLM's CPU worker, with deltas."""

    backend = CPUBackend
