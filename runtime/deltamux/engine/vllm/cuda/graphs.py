"""CUDA graphs with deltas: which graphs vLLM captures, and which of them a step replays.

vLLM keys its graphs by the number of rows and by how many LoRAs are active. The launches of deltas depend on the
modules with kernels, and not on the number of adapters. So that number is one of a `GraphProfile` here:

* BASE (0): captured without deltas, for steps without adapters and for those whose adapters have nothing to do, as
  prefix adapters have not once their prefix is in the cache. These are the graphs that the base alone replays.
* LINEAR (1) and ALL (2): captured with every kernel of the profile launched and no row of any adapter. When they are
  replayed, the step's records are what each launch reads.
* No profile: a step with an op that has no kernel, or with virtual tokens, runs without graphs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from deltamux.engine.vllm.cuda.backend import CudaBackend
from deltamux.engine.vllm.cuda.profiles import GraphProfile
from deltamux.engine.vllm.worker.manager import DeltaManager


class ProfileDispatcher(CudagraphDispatcher):
    """vLLM's dispatcher, with a profile in place of a number of LoRAs."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        # Makes `dispatch` look for the number that it is given, instead of taking the largest for all.
        self.specialize_lora_count = True

    def _get_lora_cases(self) -> list[int]:
        return [int(profile) for profile in GraphProfile]


class GraphRunnerMixin:
    """Overrides the two places where vLLM's runner chooses a graph: for a step, and for what it captures."""

    lora_manager: DeltaManager

    @property
    def _backend(self) -> CudaBackend:
        backend = self.lora_manager.backend
        assert isinstance(backend, CudaBackend)
        return backend

    def _determine_batch_execution_and_padding(
        self,
        *args: Any,
        force_eager: bool = False,
        force_has_lora: bool | None = None,
        force_num_active_loras: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if force_num_active_loras is None:  # a step of requests; vLLM forces the number for its dummy runs only
            profile = self._backend.profile()
            force_eager = force_eager or profile is None
            force_num_active_loras = int(profile or GraphProfile.BASE)
            force_has_lora = force_num_active_loras > 0
        return super()._determine_batch_execution_and_padding(  # type: ignore[misc]  # vLLM's runner is the next base
            *args,
            force_eager=force_eager,
            force_has_lora=force_has_lora,
            force_num_active_loras=force_num_active_loras,
            **kwargs,
        )

    @contextmanager
    def maybe_dummy_run_with_lora(
        self,
        lora_config: Any,
        num_scheduled_tokens: Any,
        num_sampled_tokens: Any,
        remove_lora: bool = True,
        num_active_loras: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Iterator[None]:
        self.lora_manager.indexer.forget()  # its records are overwritten
        with self._backend.capturing(GraphProfile(num_active_loras), int(num_scheduled_tokens.sum())):
            yield


def install(runner: Any) -> None:
    """Makes vLLM's model runner, which has loaded no model yet, capture and replay graphs by profile."""
    config: VllmConfig = runner.vllm_config
    if config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
        return
    runner.__class__ = type("DeltaGraphModelRunner", (GraphRunnerMixin, type(runner)), {})
    runner.cudagraph_dispatcher = ProfileDispatcher(config)
