"""vLLM's worker with the delta manager in place of its LoRA manager (``worker_cls``, vLLM's extension point)."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig

from deltamux.engine.vllm.layers import custom_ops
from deltamux.engine.vllm.loading.server import LoaderServer
from deltamux.engine.vllm.processes import report_start_error
from deltamux.engine.vllm.worker.backend import DeltaBackend
from deltamux.engine.vllm.worker.manager import DeltaManager
from deltamux.engine.vllm.worker.step import ScheduledRequest

SWITCH_SECONDS = 0.00005
"""How long a thread keeps the interpreter from another: at Python's own 5 ms, steps wait for loads and loads for steps.

The loader's threads have the step loop's priority: one of a lower would be put off while it keeps the interpreter.
"""


class DeltaRunnerMixin:
    """Overrides the places where vLLM's model runner meets adapters."""

    lora_config: Any
    lora_manager: DeltaManager
    kv_cache_config: KVCacheConfig
    vllm_config: VllmConfig
    backend: type[DeltaBackend]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model as vLLM does without LoRA, for which it would take other (slower) experts."""
        self.vllm_config.lora_config = None
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # vLLM's runner is behind the mixin

    def load_lora_model(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
        vllm_config.lora_config = self.lora_config
        self.lora_manager = DeltaManager(model, vllm_config, device, self.backend)
        return model

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        """Zeroes blocks of the cache before a request gets them; on a CPU vLLM leaves those of sliding windows out."""
        if self.vllm_config.device_config.device_type != "cpu":
            super()._zero_block_ids(block_ids)  # type: ignore[misc]  # as above
            return
        for group in self.kv_cache_config.kv_cache_groups:
            if isinstance(group.kv_cache_spec, AttentionSpec):
                for name in group.layer_names:
                    cache = self.vllm_config.compilation_config.static_forward_context[name].kv_cache
                    cache[block_ids] = 0

    def set_active_loras(self, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        count = len(num_scheduled_tokens)
        programs: np.ndarray[Any, Any] = input_batch.request_lora_mapping[:count]
        if not programs.any():
            # All rows are the base's: they count as one request.
            self.lora_manager.begin_step([ScheduledRequest(0, 0, int(num_scheduled_tokens.sum()))])
            return
        starts: np.ndarray[Any, Any] = input_batch.num_computed_tokens_cpu[:count]
        shares = zip(programs.tolist(), starts.tolist(), num_scheduled_tokens.tolist(), strict=True)
        requests = [ScheduledRequest(*share) for share in shares]
        self.lora_manager.begin_step(requests)
        self.lora_manager.write_prefixes(requests, input_batch.block_table[0])


def _reported(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a step of the worker's start whose error reaches the front end, where vLLM's own says nothing of it."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            report_start_error(error)
            raise

    return call


class DeltaWorkerMixin:
    """The calls of the engine's front end, through ``collective_rpc``.

    Attributes:
        backend: how the worker's device runs deltas.
    """

    backend: ClassVar[type[DeltaBackend]]
    model_runner: Any
    rank: int
    _server: LoaderServer | None = None

    @_reported
    def init_device(self) -> None:
        sys.setswitchinterval(SWITCH_SECONDS)
        super().init_device()  # type: ignore[misc]  # vLLM's worker is the next base
        runner = self.model_runner
        runner.__class__ = type("DeltaModelRunner", (DeltaRunnerMixin, type(runner)), {"backend": self.backend})
        custom_ops.bypass_dispatch(False)

    @_reported
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # as above

    @_reported
    def determine_available_memory(self) -> Any:
        return super().determine_available_memory()  # type: ignore[misc]  # as above

    @_reported
    def compile_or_warm_up_model(self) -> Any:
        """After this, vLLM compiles and loads nothing more: what follows are steps."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]  # as above
        custom_ops.bypass_dispatch(True)
        return times

    def delta_listen(self, directory: str, cores: list[int]) -> str | None:
        """Opens the channel to the loader's threads (see `loading`).

        Returns the socket's path; None where the front end's directory is not on this host.
        """
        loader = self._deltas.loader
        path = Path(directory) / f"worker-{self.rank}.sock"
        try:
            self._server = LoaderServer(loader, path)
        except OSError:
            return None
        loader.use_cores(cores)
        return str(path)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a step. An error ends the engine; the front end gets it before."""
        try:
            return super().execute_model(*args, **kwargs)  # type: ignore[misc]  # as above
        except Exception as error:
            if self._server is not None:
                self._server.report(f"{type(error).__name__}: {error}")
            raise

    def delta_support(self) -> dict[str, Any]:
        """Returns which ops the base takes; see `BaseSupport.plain`."""
        return self._deltas.support.plain()

    def delta_load(self, program_id: int, path: str, sha256: str) -> None:
        self._deltas.loader.load(program_id, Path(path), sha256)

    def delta_status(self, program_id: int) -> str:
        return self._deltas.loader.status(program_id)

    @torch.inference_mode()  # as the steps are, which have filled the slots that are emptied here
    def delta_unload(self, program_id: int) -> None:
        self._deltas.unload(program_id)

    def delta_pin(self, program_id: int, pinned: bool) -> None:
        self._deltas.table.pin(program_id, pinned)

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
