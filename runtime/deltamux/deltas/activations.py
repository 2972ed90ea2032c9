"""The nonlinearities of bottlenecks, by name, as torch computes them and as kernels number them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "swish": F.silu,
}

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)} | {"swish": list(ACTIVATIONS).index("silu")}
"""Their numbers in the kernels of both backends (rows.cpp, matrix.py)."""
