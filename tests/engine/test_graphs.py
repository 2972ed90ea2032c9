"""Which CUDA graph vLLM's own dispatcher picks, by profile; what it captures needs a GPU."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from deltamux.engine.base import EngineOptions
from deltamux.engine.vllm.cuda.graphs import ProfileDispatcher
from deltamux.engine.vllm.cuda.profiles import GraphProfile
from deltamux.engine.vllm.frontend.config import engine_arguments


@pytest.fixture(scope="module")
def dispatcher(base_directory: Path) -> ProfileDispatcher:
    """As on a GPU under vLLM's defaults, which vLLM switches off on a CPU."""
    arguments = EngineArgs(str(base_directory), enable_lora=True, max_loras=6, max_num_seqs=8, max_model_len=64)
    config: VllmConfig = arguments.create_engine_config()
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8]
    config.compilation_config.max_cudagraph_capture_size = 8
    config.compilation_config.set_splitting_ops_for_v1("auto")
    made = ProfileDispatcher(config)
    made.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
    return made


def test_every_size_is_captured_once_a_profile(dispatcher: ProfileDispatcher) -> None:
    captured = dict(dispatcher.get_capture_descs())
    assert set(captured) == {CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE}
    for descriptors in captured.values():
        assert len(descriptors) == 12
        assert {(desc.num_tokens, desc.num_active_loras, desc.has_lora) for desc in descriptors} == {
            (size, int(profile), profile is not GraphProfile.BASE) for size in (1, 2, 4, 8) for profile in GraphProfile
        }


@pytest.mark.parametrize("profile", list(GraphProfile))
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_a_step_replays_the_graph_of_its_profile(
    dispatcher: ProfileDispatcher, profile: GraphProfile, decode: bool
) -> None:
    mode, found = dispatcher.dispatch(3, uniform_decode=decode, has_lora=profile > 0, num_active_loras=int(profile))
    assert mode is (CUDAGraphMode.FULL if decode else CUDAGraphMode.PIECEWISE)
    assert (found.num_tokens, found.num_active_loras) == (4, int(profile))


def test_on_a_gpu_models_are_compiled_and_captured_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    assert not engine_arguments(EngineOptions("m"))["enforce_eager"]
    assert engine_arguments(EngineOptions("m", enforce_eager=True))["enforce_eager"]


def test_a_step_that_no_graph_serves_runs_without(dispatcher: ProfileDispatcher) -> None:
    none = {CUDAGraphMode.NONE}  # what the runner allows when it is eager
    assert dispatcher.dispatch(3, uniform_decode=True, valid_modes=none)[0] is CUDAGraphMode.NONE


def test_vllms_runner_has_what_the_mixin_overrides_and_the_step_before_it_chooses_its_graph() -> None:
    chooses = inspect.signature(GPUModelRunner._determine_batch_execution_and_padding).parameters
    assert {"force_eager", "force_has_lora", "force_num_active_loras"} <= set(chooses)
    captures = list(inspect.signature(GPUModelRunner.maybe_dummy_run_with_lora).parameters)
    assert captures[:6] == [
        "self",
        "lora_config",
        "num_scheduled_tokens",
        "num_sampled_tokens",
        "remove_lora",
        "num_active_loras",
    ]
    step = inspect.getsource(GPUModelRunner.execute_model)
    assert step.index("self._prepare_inputs(") < step.index("self._determine_batch_execution_and_padding(")
    assert "self.set_active_loras(" in inspect.getsource(GPUModelRunner._prepare_inputs)
