"""QLoRA: LoRA, trained over a base that is quantised to four bits.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.

    y = dequantise(NF4(W)) x + s B (A x)

While training, every projection of the base is quantised to NF4 in blocks of 64, the blocks' scales once more (double
quantisation), by bitsandbytes, which runs on CPUs, too (``pip install 'deltamux[qlora]'``). The result is a LoRA like
any other: its files are PEFT's LoRA, and it is served on the full base or on a quantised one. Merging it by this
method (``deltamux merge --method qlora``) adds it to the dequantised weights it was trained over, and reports how far
those are from the base's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from deltamux.deltas import BaseModel, Program, merge_program
from deltamux.errors import FailedPreconditionError, InvalidConfigError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins import lora
from deltamux_plugins.configs import invalid
from deltamux_plugins.lora import LoRAConfig


@dataclass(frozen=True)
class QLoRAConfig(LoRAConfig):
    """LoRA's options, and those of the quantised base.

    Attributes:
        quant_type: nf4 or fp4.
        double_quant: whether the blocks' scales are quantised, too.
        blocksize: weights per block.
    """

    quant_type: str = "nf4"
    double_quant: bool = True
    blocksize: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quant_type not in ("nf4", "fp4"):
            raise invalid("quant_type", f"is nf4 or fp4, not {self.quant_type!r}")
        if self.use_dora or self.bias != "none":
            raise InvalidConfigError(
                "QLoRA trains neither magnitudes (use_dora) nor biases", metadata={"field": "bias"}
            )


# Train.


@hookimpl
def deltamux_parameters(config: QLoRAConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    if any(site.transposed for site in base.linears):
        raise InvalidConfigError(f"{base.architecture} holds its projections transposed, which cannot be quantised")
    return lora.deltamux_parameters(config, base)


@hookimpl
def deltamux_prepare(config: QLoRAConfig, base: BaseModel, model: nn.Module) -> bool:
    bnb = _bitsandbytes()
    for site in base.linears:
        parent, _, own = site.name.rpartition(".")
        setattr(model.get_submodule(parent), own, _quantised(bnb, config, model.get_submodule(site.name)))
    return True


def _quantised(bnb: Any, config: QLoRAConfig, linear: Any) -> nn.Module:
    """Returns a projection with its weight in four bits, on the same device."""
    module: nn.Module = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=config.double_quant,
        quant_type=config.quant_type,
    )
    module.weight = bnb.nn.Params4bit(
        linear.weight.detach(),
        requires_grad=False,
        compress_statistics=config.double_quant,
        quant_type=config.quant_type,
        blocksize=config.blocksize,
        module=module,
    )
    module.bias = linear.bias
    return module.to(linear.weight.device).requires_grad_(False)


@hookimpl
def deltamux_config(config: QLoRAConfig, base: BaseModel) -> dict[str, Any]:
    return lora.deltamux_config(LoRAConfig(**{f.name: getattr(config, f.name) for f in fields(LoRAConfig)}), base)


# Merge.


@hookimpl
def deltamux_merge(config: QLoRAConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    linears = {f"{site.name}.weight": site for site in base.linears}

    def read(name: str) -> Tensor:
        weight = base.tensor(name)
        return dequantised(config, weight) if name in linears else weight

    over_quantised = replace(base, _read=read)
    merged = merge_program(lora.deltamux_program(config, over_quantised, tensors), over_quantised)
    others = {name for name in linears if name not in merged}
    return {**merged, **{name: read(name) for name in sorted(others)}}


def dequantised(config: QLoRAConfig, weight: Tensor) -> Tensor:
    """Returns a weight [out, in] quantised and dequantised again, in its own dtype."""
    from bitsandbytes import functional

    _bitsandbytes()
    given: dict[str, Any] = {"blocksize": config.blocksize, "quant_type": config.quant_type}
    packed, state = functional.quantize_4bit(weight.contiguous(), compress_statistics=config.double_quant, **given)
    back: Tensor = functional.dequantize_4bit(packed, state)
    return back.to(weight.dtype)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise FailedPreconditionError(
            "QLoRA needs bitsandbytes, which is not installed: pip install 'deltamux[qlora]'",
            reason="BITSANDBYTES_MISSING",
        ) from None
    return bitsandbytes


# Inference: LoRA's.


@hookimpl
def deltamux_program(config: QLoRAConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    return lora.deltamux_program(config, base, tensors)


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="qlora",
        title="QLoRA",
        summary="LoRA, trained over a base that is held in four bits",
        paper="https://arxiv.org/abs/2305.14314",
        peft_type="LORA",
        files_of="lora",
        config_class=QLoRAConfig,
        ignored_keys=lora.IGNORED,
        merges=True,
        in_peft=True,
        learning_rate=2e-4,
        learning_rate_source="Dettmers et al. 2023, table 9: 2e-4 up to 13B",
        learning_rate_width=4096,
    )
