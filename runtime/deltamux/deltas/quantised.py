"""The values of weights that a checkpoint stores as codes of 8 bits with their scales.

compressed-tensors: ``weight`` of int8 or float8, ``weight_scale`` per tensor, row or group, ``weight_zero_point`` where
the codes are not symmetric. Fine-grained FP8 (DeepSeek-V3's): ``weight_scale_inv`` per block. The value of a code q is
(q - zero point) * scale.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from deltamux.errors import QuantisedBaseError

PLAIN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale", "_scale_inv")
ZERO_POINT = "_zero_point"
PACKED = ("qweight", "weight_packed", "weight_blocks", "weight.absmax", "weight_g_idx")
"""Tensors of a module whose weight is packed: AWQ and GPTQ, compressed-tensors, MXFP4, bitsandbytes; or permuted."""


def scale_name(name: str, stored: Collection[str]) -> str | None:
    """Returns the name of the scale of a weight's codes; None where there is none."""
    return next((name + suffix for suffix in SCALES if name + suffix in stored), None)


def packed_as(name: str, stored: Collection[str]) -> str | None:
    """Returns the name of the tensor that holds the packed values of a weight; None where none does."""
    module = name.rpartition(".")[0]
    return next((f"{module}.{own}" for own in PACKED if f"{module}.{own}" in stored), None)


def values(codes: Tensor, scale: Tensor, zero_point: Tensor | None, first: int, num_rows: int) -> Tensor | None:
    """Returns the values [n, in] of rows `first` to `first` + n, in float32.

    Args:
        codes: of these rows [n, in].
        scale, zero_point: of the whole weight, of shape [], [1], [out], [out or rows of blocks, columns of blocks].
        num_rows: of the whole weight.
    Returns:
        None where a weight's blocks are not all of one size.
    """
    scale = scale.float().reshape(scale.shape[0] if scale.ndim else 1, -1)
    if num_rows % scale.shape[0] or codes.shape[1] % scale.shape[1]:
        return None
    rows = torch.arange(first, first + codes.shape[0]) // (num_rows // scale.shape[0])
    columns = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
    found = codes.float()
    if zero_point is not None:
        found = found - zero_point.float().reshape(scale.shape)[rows][:, columns]
    return found * scale[rows][:, columns]


def quantised_error(name: str, how: str) -> QuantisedBaseError:
    return QuantisedBaseError(
        f"the base stores {name} quantised ({how}), and its values are needed: this base serves what adds to a "
        "projection's outputs (LoRA, bottlenecks, biases, prefixes); DoRA, OFT and others that compute with the base's "
        "weights need one whose values can be read",
        metadata={"tensor": name},
    )
