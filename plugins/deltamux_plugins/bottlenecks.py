"""`BottleneckMethod`: the methods that place a bottleneck at sub-layers (houlsby, pfeiffer, parallel).

    y += s (W_up f(W_down z + b_down) + b_up),   W_down [m, d], W_up [d, m]

z is the sub-layer's output y, or its input in a parallel adapter. PEFT has no such methods: the files have PEFT's
layout, with tensor names that do not depend on the architecture's module paths.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux import hookimpl
from deltamux.deltas import BaseModel, BlockRole, BlockSite, Bottleneck, Checkpoint, Op, Program
from deltamux.deltas.activations import ACTIVATIONS
from deltamux.errors import InvalidAdapterError, NotMergeableError
from deltamux.hookspecs import MethodInfo, ParameterSpec
from deltamux_plugins import adapterhub
from deltamux_plugins.configs import VersionedConfig, invalid


@dataclass(frozen=True)
class BottleneckConfig(VersionedConfig):
    """The config of a bottleneck adapter.

    Attributes:
        bottleneck: inner width m; None derives it from reduction_factor.
        reduction_factor: hidden size divided by m, where bottleneck is None.
        activation: f, one of deltamux.deltas.activations.ACTIVATIONS.
        scale: s, what the change is multiplied by.
        reads_residual: whether W_down reads the residual stream that y was added to (in a parallel adapter: before the
            sub-layer's norm), as AdapterHub places its Pfeiffer and parallel adapters.
        train_norms: whether the norms' weights (and biases, where the base has them) change; of houlsby alone.
    """

    bottleneck: int | None = None
    reduction_factor: float = 16
    activation: str = "gelu"
    scale: float = 1.0
    train_norms: bool = False
    reads_residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck is not None and not (isinstance(self.bottleneck, int) and self.bottleneck > 0):
            raise invalid("bottleneck", f"is a positive integer, not {self.bottleneck!r}")
        if self.reduction_factor <= 0:
            raise invalid("reduction_factor", f"is positive, not {self.reduction_factor}")
        if self.activation not in ACTIVATIONS:
            raise invalid("activation", f"is one of {', '.join(sorted(ACTIVATIONS))}, not {self.activation!r}")

    def width(self, hidden_size: int) -> int:
        return self.bottleneck or max(1, int(hidden_size / self.reduction_factor))


class BottleneckMethod:
    """A method with one bottleneck at every sub-layer of some roles.

    Args:
        roles: of the sub-layers.
        parallel: whether W_down reads the sub-layer's input instead of its output.
        config_class: a subclass of `BottleneckConfig`.
        name, title, summary, paper: as `MethodInfo` has them.
    """

    def __init__(
        self,
        *,
        name: str,
        title: str,
        summary: str,
        paper: str,
        roles: Collection[BlockRole],
        parallel: bool = False,
        config_class: type[BottleneckConfig] = BottleneckConfig,
    ) -> None:
        self._roles = roles
        self._parallel = parallel
        self._info = MethodInfo(
            name=name,
            title=title,
            summary=summary,
            paper=paper,
            peft_type=f"DELTAMUX_{name.upper()}",
            config_class=config_class,
            merges=False,
            in_peft=False,
            learning_rate=1e-3,
            learning_rate_source="within the sweep of Houlsby et al. 2019, section 3.2: 3e-5 to 3e-3",
            learning_rate_width=1024,
        )

    @hookimpl
    def deltamux_method(self) -> MethodInfo:
        return self._info

    def blocks(self, base: BaseModel) -> Iterator[BlockSite]:
        """Yields the sub-layers that get a bottleneck."""
        return (block for block in base.blocks if block.role in self._roles)

    @hookimpl
    def deltamux_parameters(self, config: BottleneckConfig, base: BaseModel) -> dict[str, ParameterSpec]:
        zeros, parameters = torch.nn.init.zeros_, dict[str, ParameterSpec]()
        for block in self.blocks(base):
            width = config.width(block.features)
            # The paper starts near the identity; a zero W_up starts at it, and is trained since W_down is not zero.
            parameters[f"{block.name}.down.weight"] = ParameterSpec((width, block.features), _small_normal)
            parameters[f"{block.name}.down.bias"] = ParameterSpec((width,), zeros)
            parameters[f"{block.name}.up.weight"] = ParameterSpec((block.features, width), zeros)
            parameters[f"{block.name}.up.bias"] = ParameterSpec((block.features,), zeros)
        return parameters

    @hookimpl
    def deltamux_config(self, config: BottleneckConfig, base: BaseModel) -> dict[str, Any]:
        return {**asdict(config), "bottleneck": config.width(base.dims.hidden_size), "task_type": "CAUSAL_LM"}

    @hookimpl
    def deltamux_merge(
        self, config: BottleneckConfig, base: BaseModel, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        raise NotMergeableError(
            "adapter tuning cannot be merged: its bottlenecks hold a nonlinearity "
            f"({config.activation}) between two projections, which no weight of the base can express. Serve it as an "
            "adapter, or train LoRA instead"
        )

    @hookimpl
    def deltamux_program(self, config: BottleneckConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
        return Program.of(self.placements(config, base, tensors))

    def placements(
        self, config: BottleneckConfig, base: BaseModel, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Op]]:
        """Yields the bottlenecks with their sub-layers' names.

        Raises:
            InvalidAdapterError: a tensor has another width than the config.
        """
        for block in self.blocks(base):
            _check_width(config, f"{block.name}.down.weight", tensors)
            yield (
                block.name,
                Bottleneck(
                    down_weight=tensors[f"{block.name}.down.weight"],
                    down_bias=tensors[f"{block.name}.down.bias"],
                    up_weight=tensors[f"{block.name}.up.weight"],
                    up_bias=tensors[f"{block.name}.up.bias"],
                    activation=config.activation,
                    scale=config.scale,
                    parallel=self._parallel,
                    residual=config.reads_residual,
                ),
            )

    @hookimpl
    def deltamux_recognise(self, checkpoint: Checkpoint) -> Checkpoint | None:
        return adapterhub.recognise(checkpoint, self._info.peft_type)


def _small_normal(tensor: Tensor) -> Tensor:
    return torch.nn.init.normal_(tensor, std=tensor.shape[1] ** -0.5)


def _check_width(config: BottleneckConfig, name: str, tensors: Mapping[str, Tensor]) -> None:
    # A converted adapter may have a width of its own at every sub-layer: then its config names none.
    shape = list(tensors[name].shape) if config.bottleneck else None
    if shape is not None and (len(shape) != 2 or shape[0] != config.bottleneck):
        raise InvalidAdapterError(
            f"{name} has shape {shape}, but adapter_config.json says width {config.bottleneck}",
            reason="RANK_MISMATCH",
            metadata={"tensor": name},
        )
