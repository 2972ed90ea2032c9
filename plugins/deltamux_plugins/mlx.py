"""Reads MLX-LM's adapters as LoRA's.

    y = W x + scale (x a) b,   a [in, r], b [r, out]

So A is a transposed, B is b transposed, and lora_alpha is scale times r. DoRA's magnitude ``m`` is PEFT's own.
"""

from typing import Any

from torch import Tensor

from deltamux.deltas import Checkpoint
from deltamux.errors import InvalidAdapterError, InvalidConfigError
from deltamux_plugins.peft_format import CAUSAL_LM, PREFIX

PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
KEYS = {"fine_tune_type", "lora_parameters"}


def recognise(checkpoint: Checkpoint) -> Checkpoint | None:
    """Returns an MLX-LM checkpoint as LoRA's; None if it is not MLX-LM's.

    Raises:
        InvalidConfigError: it is a full fine-tuning, or lacks its rank or scale.
        InvalidAdapterError: a tensor is not one of LoRA's at a projection.
    """
    config = checkpoint.config
    if "peft_type" in config or not KEYS & set(config):
        return None
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        problem = f"{kind!r:.40} is not lora or dora: fuse it with mlx_lm.fuse, and serve that model"
        raise _refused("fine_tune_type", problem)
    rank, scale = _parameters(config.get("lora_parameters"))
    tensors: dict[str, Tensor] = {}
    paths: set[str] = set()
    for name, tensor in checkpoint.tensors.items():
        path, _, part = name.rpartition(".")
        if part not in PARTS or tensor.dim() != (1 if part == "m" else 2):
            raise InvalidAdapterError(
                f"tensor {name[:200]!r} of shape {list(tensor.shape)} is not MLX-LM's LoRA at a projection (lora_a, "
                "lora_b, m): experts and whole modules are not served",
                reason="UNCLAIMED_TENSOR",
                metadata={"tensor": name[:200]},
            )
        paths.add(path)
        tensors[f"{PREFIX}{path}.{PARTS[part]}"] = tensor if part == "m" else tensor.t().contiguous()
    values = {"r": rank, "lora_alpha": scale * rank, "use_dora": kind == "dora", "target_modules": sorted(paths)}
    return Checkpoint({**values, **CAUSAL_LM, "peft_type": "LORA"}, tensors, checkpoint.metadata)


def _parameters(given: Any) -> tuple[int, float]:
    values = given if isinstance(given, dict) else {}
    rank, scale = values.get("rank"), values.get("scale")
    if type(rank) is not int or rank < 1:
        raise _refused("lora_parameters", f"rank is {rank!r:.40}, not a positive integer")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise _refused("lora_parameters", f"scale is {scale!r:.40}, not a number")
    return rank, float(scale)


def _refused(field: str, problem: str) -> InvalidConfigError:
    return InvalidConfigError(f"an MLX-LM adapter cannot be read: {field}: {problem}", metadata={"field": field})
