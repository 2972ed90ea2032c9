"""The translation of `EngineOptions` to vLLM's configuration."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltamux import __version__
from deltamux.deltas.base_model import read_base_config
from deltamux.engine.base import EngineOptions
from deltamux.engine.vllm.fork_server import set_environment
from deltamux.errors import FailedPreconditionError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SLOTS = {"cpu": 32, "cuda": 8}
"""Default number of device slots. On a CPU nearly all ops are served from host memory, and a slot costs nothing."""

KERNEL_RANK = 64
"""Rank, and width of bottlenecks, for which the static buffers on a GPU have room; wider ops run in torch."""


def engine_config(options: EngineOptions) -> VllmConfig:
    """Returns vLLM's configuration, with the base's own compilation: vLLM's CPU build compiles no model with adapters.

    The layers' changes are custom ops, so that a model with deltas compiles like one without.

    Raises:
        FailedPreconditionError: the installed vLLM is for another device, or has no attention for the base.
    """
    set_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        # A process that has used CUDA cannot fork one that does, and plugins may have used it.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    arguments = AsyncEngineArgs(**engine_arguments(options))
    _check_imports(str(options.model))
    config = arguments.create_engine_config()
    if config.device_config.device_type == "cpu":
        check_head_size(config)
    plain = replace(arguments, enable_lora=False, worker_cls="auto").create_engine_config()
    # One engine has one backend of grammars: with "auto", the first grammar would choose it for all others.
    if config.structured_outputs_config.backend == "auto":
        config.structured_outputs_config.backend = "xgrammar"
    config.compilation_config.mode = plain.compilation_config.mode
    return config


def _check_imports(model: str) -> None:
    """Raises FailedPreconditionError where vLLM's model of a base that reads images or sound does not import here.

    It would fail later, in another process, and in vLLM's own words: what vLLM knows of a model from an earlier start
    is kept in files.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    config = read_base_config(model)
    if config.get_text_config() is config:
        return
    for architecture in config.architectures or ():
        module = getattr(ModelRegistry.models.get(architecture), "module_name", None)
        try:
            if module is not None:
                import_module(module)
        except Exception as error:  # whatever such a model imports
            if "torchvision" in str(error):
                raise FailedPreconditionError(
                    "vLLM cannot import its model of this base, as torchvision is not installed, which bases that read "
                    "images need: install its build for this torch (on a CPU: pip install torchvision --index-url "
                    "https://download.pytorch.org/whl/cpu)",
                    reason="TORCHVISION_MISSING",
                ) from error
            raise FailedPreconditionError(
                f"vLLM cannot import its model of this base: {type(error).__name__}: {error}", reason="BASE_CANNOT_RUN"
            ) from error


def device_of(options: EngineOptions) -> str:
    """Returns "cpu" or "cuda".

    Raises:
        FailedPreconditionError: the installed vLLM is for another device.
    """
    from vllm.platforms import current_platform

    device = options.device if options.device != "auto" else ("cuda" if current_platform.is_cuda() else "cpu")
    if (device == "cuda") != current_platform.is_cuda():
        raise FailedPreconditionError(
            f"device {device!r} was asked for, but the installed vLLM is built for {current_platform.device_name}: "
            "install the other build, or leave the device to be chosen",
            reason="WRONG_DEVICE",
        )
    return device


def engine_arguments(options: EngineOptions) -> dict[str, Any]:
    """Returns the arguments of vLLM's AsyncEngineArgs; those that the operator gave take precedence."""
    device = device_of(options)
    worker = "cuda.worker.GPUDeltaWorker" if device == "cuda" else "worker.cpu.CPUDeltaWorker"
    arguments: dict[str, Any] = {
        "model": str(options.model),
        "dtype": options.dtype,
        "seed": options.seed,
        "max_num_seqs": options.max_num_seqs,
        "enable_lora": True,
        "max_loras": options.max_active_adapters or SLOTS[device],
        "enable_prefix_caching": True,
        "enforce_eager": options.enforce_eager,
        "scheduler_cls": "deltamux.engine.vllm.scheduling.scheduler.time_slicing_scheduler",
        "scheduling_policy": "priority",
        "worker_cls": f"deltamux.engine.vllm.{worker}",
        "disable_log_stats": True,
        # Requests have no images: what reads them is not loaded.
        "language_model_only": True,
        # The files that the trainers read as well, also where a folder has Mistral's own, too.
        **dict.fromkeys(("config_format", "load_format", "tokenizer_mode"), "hf"),
    }
    if options.max_model_len is not None:
        arguments["max_model_len"] = options.max_model_len
    if device == "cpu":
        arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gib * 1024**3)
    else:
        arguments["max_lora_rank"] = KERNEL_RANK
    given = dict(options.engine_arguments)
    # Part of the key under which compiled models are kept: those of a plain vLLM have no custom ops of ours.
    own = {"deltamux": __version__, "auto_merge": options.auto_merge}
    return {**arguments, **given, "additional_config": {**given.get("additional_config", {}), **own}}


def check_head_size(config: VllmConfig) -> None:
    """Raises FailedPreconditionError if vLLM's attention for CPUs has no kernel for the base's attention heads."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, sizes = config.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size and size not in sizes and not config.model_config.use_mla:  # a base without attention has size 0
        raise FailedPreconditionError(
            f"the base model's attention heads have size {size}; on a CPU vLLM has attention for sizes "
            f"{', '.join(map(str, sizes))}: serve it on a GPU, or take another base",
            reason="BASE_CANNOT_RUN",
            metadata={"head_size": str(size)},
        )
