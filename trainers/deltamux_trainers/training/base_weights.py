"""The base's weights that are trained in place: those whose change (the delta) is a parameter of the method."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamux.deltas import BaseModel, SiteKind
from deltamux.errors import PluginError
from deltamux.hookspecs import ParameterSpec
from deltamux.registry import Method

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of bases whose weights are trained in place, in float32; the forward pass runs in the base's dtype."""


class BaseWeight(NamedTuple):
    """A weight of the base that is trained in place.

    Attributes:
        parameter: of the model, float32.
        name: of the base's parameter.
        transposed: whether the model holds it transposed, [in_features, out_features].
    """

    parameter: nn.Parameter
    name: str
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the delta."""
        shape = tuple(self.parameter.shape)
        return shape[::-1] if self.transposed else shape

    def delta(self, base: BaseModel) -> Tensor:
        """Returns the present weight minus the one in the base's files, float32, as the method declares it."""
        present = self.parameter.detach()
        delta = present - base.tensor(self.name).to(present)
        return delta.t().contiguous() if self.transposed else delta


def trainable_base_weights(
    method: Method, config: Any, base: BaseModel, model: nn.Module, specs: Mapping[str, ParameterSpec]
) -> dict[str, BaseWeight]:
    """Returns the weights that are trained in place, made trainable, by parameter; none where the deltas are trained.

    Args:
        base: reads the base's files.
        specs: the method's declarations.
    Raises:
        PluginError: the method's hook names other parameters than it declares, or of other shapes.
    """
    named = method.weights(config, base)
    has_float_weights = all(parameter.dtype in DTYPES for parameter in model.parameters())
    if not (named and base.name and has_float_weights and _is_plain_lookup(base, model)):
        return {}
    weights = {name: _base_weight(base, model, parameter) for name, parameter in named.items()}
    if {name: each.shape for name, each in weights.items()} != {name: tuple(s.shape) for name, s in specs.items()}:
        raise PluginError(
            f"plugin {method.plugin!r}: deltamux_weights names other parameters than deltamux_parameters declares, or "
            "base parameters of other shapes",
            metadata={"plugin": method.plugin, "hook": "deltamux_weights"},
        )
    for each in weights.values():
        each.parameter.data = base.tensor(each.name).to(each.parameter.device, torch.float32)
        each.parameter.requires_grad_(True)
    return weights


def _base_weight(base: BaseModel, model: nn.Module, name: str) -> BaseWeight:
    module, _, field = name.rpartition(".")
    site: Any = base.sites.get((SiteKind.LINEAR, module))
    return BaseWeight(model.get_parameter(name), name, field == "weight" and site is not None and site.transposed)


@torch.no_grad()
def _is_plain_lookup(base: BaseModel, model: nn.Module) -> bool:
    """Returns whether the embedding's output is its rows: where it scales them, their delta is not the output's."""
    embedding: Any = model.get_submodule(base.embedding.name)
    ids = torch.arange(min(8, base.embedding.vocab_size), device=embedding.weight.device)
    return torch.equal(embedding(ids), F.embedding(ids, embedding.weight))
