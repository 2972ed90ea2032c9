"""The dtype of a base's weights, where none is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

from deltamux.engine.base import EngineOptions

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Of x86 and of ARM processors that multiply in bfloat16."""
FLOAT32_BYTES = 4
ROOM_GIB = 2.0
"""Left for all but the weights and the KV cache."""
GIB = 1024**3


class Dtype(NamedTuple):
    """A dtype as vLLM names it, and why it was taken."""

    name: str
    reason: str


def choose(options: EngineOptions, num_parameters: int, device: str) -> Dtype:
    """Returns the dtype of the options, or that in which the base is fast here.

    A processor without instructions for bfloat16 converts every product's inputs: it runs a base at some 0.4 of
    float32's speed (AVX2; see the results).
    """
    if options.dtype != "auto":
        return Dtype(options.dtype, "as asked for")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.model)
    stored = str(config.get_text_config().dtype or config.dtype or "torch.float32").removeprefix("torch.")
    quantised = getattr(config, "quantization_config", None) is not None
    if device != "cpu" or stored == "float32" or quantised:
        return Dtype("auto", "as the base is stored")
    if BFLOAT16_FLAGS & _cpu_flags():
        return Dtype("auto", f"as the base is stored ({stored}), which this processor has instructions for")
    needed = num_parameters * FLOAT32_BYTES / GIB + options.kv_cache_gib + ROOM_GIB
    available = psutil.virtual_memory().available / GIB
    if needed > available:
        return Dtype(
            "auto",
            f"as the base is stored ({stored}): float32 would be faster on this processor, but takes {needed:.1f} GiB "
            f"of {available:.1f} that are free",
        )
    return Dtype("float32", f"this processor has no instructions for {stored}, in which the base is stored")


def _cpu_flags() -> frozenset[str]:
    """Returns the instruction sets of this processor, as Linux names them; none elsewhere."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
