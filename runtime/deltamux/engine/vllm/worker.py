"""vLLM's worker with the delta manager in place of its LoRA manager (``worker_cls``, vLLM's extension point)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig

from deltamux.deltas.kernels import triton
from deltamux.engine.vllm import opaque
from deltamux.engine.vllm.loader_link import LoaderServer
from deltamux.engine.vllm.manager import DeltaManager, ScheduledRequest
from deltamux.engine.vllm.processes import end_with_engine


def _manager_class(device: torch.device) -> type[DeltaManager]:
    if not triton.available(device):
        return DeltaManager
    from deltamux.engine.vllm.kernel_manager import KernelDeltaManager  # imports Triton

    return KernelDeltaManager


class DeltaRunnerMixin:
    """Overrides the two places where vLLM's model runner meets adapters."""

    lora_manager: DeltaManager

    def load_lora_model(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
        self.lora_manager = _manager_class(device)(model, vllm_config, device)
        return model

    def set_active_loras(self, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        count = len(num_scheduled_tokens)
        programs: np.ndarray[Any, Any] = input_batch.request_lora_mapping[:count]
        if not programs.any():
            # Whose rows of the base are whose says nothing here: they are looked at as one.
            self.lora_manager.begin_step([ScheduledRequest(0, 0, int(num_scheduled_tokens.sum()))])
            return
        starts: np.ndarray[Any, Any] = input_batch.num_computed_tokens_cpu[:count]
        shares = zip(programs.tolist(), starts.tolist(), num_scheduled_tokens.tolist(), strict=True)
        requests = [ScheduledRequest(*share) for share in shares]
        self.lora_manager.begin_step(requests)
        self.lora_manager.write_prefixes(requests, input_batch.block_table[0])


class DeltaWorkerMixin:
    """What a worker answers to the engine's front end, through ``collective_rpc``."""

    model_runner: Any
    rank: int
    _link: LoaderServer | None = None

    def init_device(self) -> None:
        end_with_engine()
        super().init_device()  # type: ignore[misc]  # vLLM's worker stands behind the mixin
        runner = self.model_runner
        runner.__class__ = type("DeltaModelRunner", (DeltaRunnerMixin, type(runner)), {})
        opaque.call_directly(False)

    def compile_or_warm_up_model(self) -> Any:
        """Ends what vLLM compiles and loads of compiled models; what comes next are steps."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]  # as above
        opaque.call_directly(True)
        return times

    def delta_listen(self, directory: str, cores: list[int]) -> str | None:
        """Opens a way to the loader thread beside the step loop (see `loader_link`).

        Returns the socket's path; None where the front end's directory is not here, but on another host.
        """
        loader = self._deltas.loader
        path = Path(directory) / f"worker-{self.rank}.sock"
        try:
            self._link = LoaderServer(loader, path)
        except OSError:
            return None
        loader.use_cores(cores)
        return str(path)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a step. What it raises ends the engine; the front end is told before."""
        try:
            return super().execute_model(*args, **kwargs)  # type: ignore[misc]  # as above
        except Exception as error:
            if self._link is not None:
                self._link.report(f"{type(error).__name__}: {error}")
            raise

    def delta_bound(self) -> list[tuple[str, str]]:
        """Returns kind and name of every site that takes ops."""
        return self._deltas.bound()

    def delta_load(self, program_id: int, path: str, sha256: str) -> None:
        self._deltas.loader.load(program_id, Path(path), sha256)

    def delta_status(self, program_id: int) -> str:
        return self._deltas.loader.status(program_id)

    @torch.inference_mode()  # as the steps are, which have put into the slots what is cleared here
    def delta_unload(self, program_id: int) -> None:
        self._deltas.unload(program_id)

    def delta_pin(self, program_id: int, pinned: bool) -> None:
        self._deltas.pin(program_id, pinned)

    def delta_writes_prefixes(self) -> bool:
        """Whether virtual tokens whose keys and values are known need no computing (see `prefixes`)."""
        runner = self.model_runner
        return self._deltas.writes_prefixes and len(runner.kv_cache_config.kv_cache_groups) == 1

    def delta_resident(self) -> dict[str, list[int]]:
        return self._deltas.resident()

    @property
    def _deltas(self) -> DeltaManager:
        manager: DeltaManager = self.model_runner.lora_manager
        return manager
