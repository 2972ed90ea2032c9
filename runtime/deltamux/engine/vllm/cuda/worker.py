"""The workers for devices with Triton's kernels."""

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from deltamux.engine.vllm.cuda import graphs
from deltamux.engine.vllm.cuda.backend import CudaBackend
from deltamux.engine.vllm.layers import custom_ops
from deltamux.engine.vllm.worker.worker import DeltaWorkerMixin


class GPUDeltaWorker(DeltaWorkerMixin, Worker):
    """vLLM's CUDA worker, with deltas."""

    backend = CudaBackend

    def init_device(self) -> None:
        super().init_device()
        custom_ops.trace_by_name(True)
        graphs.install(self.model_runner)


class InterpretedDeltaWorker(DeltaWorkerMixin, CPUWorker):
    """vLLM's CPU worker with the kernels in Triton's interpreter (``TRITON_INTERPRET=1``): slow, for tests."""

    backend = CudaBackend
