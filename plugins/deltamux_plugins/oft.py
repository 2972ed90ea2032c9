"""OFT: the inputs of a projection are rotated, block by block.

Qiu et al. 2023, https://arxiv.org/abs/2306.07280; Qiu et al. 2025 (OFTv2, Cayley-Neumann),
https://arxiv.org/abs/2506.19847.

    y = W R^T x + b,   R = diag(R_1 .. R_n),   R_i = (I + Q_i)(I - Q_i)^-1,   Q_i skew-symmetric

With `use_cayley_neumann`, (I - Q)^-1 is the Neumann series up to the given number of terms, as PEFT sums it. Served as
`Dense`, W (R^T - I), since packed projections share their input. Files are PEFT's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, Dense, LinearSite, Program
from deltamux.errors import InvalidConfigError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import check_no_bias
from deltamux_plugins.peft_format import AS_PEFT, PREFIX, refuse_to_train, shaped
from deltamux_plugins.targets import Targeted, fan_in_fan_out, peft_values, targets

PEFT_VERSION = "0.21.0"
"""The version of PEFT whose files these are."""


@dataclass(frozen=True)
class OFTConfig(Targeted):
    """PEFT's OFTConfig.

    Attributes:
        r: number of blocks; or oft_block_size: their size. One of the two is zero.
        module_dropout: of PEFT's training; not applied here.
        coft: whether each Q is kept within `eps` of zero (constrained OFT).
        block_share: whether all blocks share one rotation.
        use_cayley_neumann, num_cayley_neumann_terms: the series in place of the inverse, and its length.
        bias: none; adapters whose biases were trained are not served.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r > 0) == (self.oft_block_size > 0) or min(self.r, self.oft_block_size) < 0:
            raise InvalidConfigError(
                f"one of r and oft_block_size is positive, the other zero, not {self.r} and {self.oft_block_size}",
                metadata={"field": "oft_block_size"},
            )
        check_no_bias(self.bias)

    def blocks(self, site: LinearSite) -> tuple[int, int]:
        """Returns (number of blocks, their size), rounded to the nearest divisor of the inputs."""
        size = site.in_features
        chosen = _nearest_divisor(size, self.r or self.oft_block_size)
        return (chosen, size // chosen) if self.r else (size // chosen, chosen)


# Train.


@hookimpl
def deltamux_parameters(config: OFTConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    refuse_to_train(config, "module_dropout", "modules_to_save")

    def init(tensor: Tensor) -> None:
        torch.nn.init.zeros_(tensor) if config.init_weights else torch.nn.init.normal_(tensor, std=0.1)

    return {_name(site): ParameterSpec(_shape(config, site), init) for site in targets(config, base)}


@hookimpl
def deltamux_config(config: OFTConfig, base: BaseModel) -> dict[str, Any]:
    # PEFT reads a file without a version as one of before 0.18, with another series.
    return {**peft_values(config, base), **fan_in_fan_out(config, base), "peft_version": PEFT_VERSION}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: OFTConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    def change(site: LinearSite) -> Dense:
        number, size = config.blocks(site)
        rotation = _rotation(config, shaped(tensors, _name(site), _shape(config, site), base), size)
        weight = base.tensor(f"{site.name}.weight").to(rotation)
        weight = (weight.t() if site.transposed else weight).reshape(site.out_features, number, size)
        moved = rotation - torch.eye(size, dtype=rotation.dtype, device=rotation.device)
        return Dense(torch.einsum("onc,nkc->onk", weight, moved.expand(number, size, size)).flatten(1))

    return Program.of((site.name, change(site)) for site in targets(config, base))


def _rotation(config: OFTConfig, weight: Tensor, size: int) -> Tensor:
    """Returns the rotations [blocks, size, size] of their skew-symmetric parameters [blocks, size (size - 1) / 2]."""
    rows, columns = torch.triu_indices(size, size, 1, device=weight.device)
    q = weight.new_zeros(len(weight), size, size)
    q = q.index_put((torch.arange(len(weight), device=weight.device).unsqueeze(1), rows, columns), weight)
    q = q - q.transpose(1, 2)
    if config.coft:
        limit = config.eps / len(weight) ** 0.5
        norm = q.detach().norm(dim=(1, 2), keepdim=True)
        q = torch.where(norm <= limit, q, q * (limit / norm))
    eye = torch.eye(size, dtype=weight.dtype, device=weight.device).expand_as(q)
    if not config.use_cayley_neumann:
        rotation: Tensor = torch.linalg.solve(eye + q, eye - q, left=False)
        return rotation
    return _neumann(q, eye, config.num_cayley_neumann_terms)


def _neumann(q: Tensor, eye: Tensor, terms: int) -> Tensor:
    """Returns I + 2 Q + 2 Q^2 + ... with the last power counted once, as PEFT does."""
    if terms <= 1:
        return eye
    total = eye + 2 * q
    if terms == 2:
        return total
    power = q @ q
    total = total + 2 * power
    for _ in range(3, terms - 1):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def _shape(config: OFTConfig, site: LinearSite) -> tuple[int, int]:
    number, size = config.blocks(site)
    return (1 if config.block_share else number, size * (size - 1) // 2)


def _nearest_divisor(size: int, wanted: int) -> int:
    """Returns the divisor of `size` nearest to `wanted`, the smaller of two that are equally near."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))


def _name(site: LinearSite) -> str:
    return f"{PREFIX}{site.name}.oft_R.weight"


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="oft",
        title="OFT",
        summary="block-wise rotations of the inputs of chosen projections",
        paper="https://arxiv.org/abs/2306.07280",
        peft_type="OFT",
        config_class=OFTConfig,
        ignored_keys=frozenset({"fan_in_fan_out"}),
        file_defaults=AS_PEFT,
        merges=True,
        in_peft=True,
        learning_rate=1e-3,
        learning_rate_source="Qiu et al. 2025, appendix: 1e-4 to 8e-4 for large models; small ones take more",
    )
