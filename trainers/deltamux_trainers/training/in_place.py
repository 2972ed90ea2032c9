"""Trains the base's own weights where a method's parameters are changes of them, which are computed at the end."""

from __future__ import annotations

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
"""Of bases whose weights are trained in place, in float32; over a bfloat16 base the forward pass runs in bfloat16."""


class OwnWeight(NamedTuple):
    """A weight of the base that is trained in place of the change that a method declares.

    Attributes:
        parameter: of the model, float32.
        name: of the base's parameter.
        transposed: whether the model holds it transposed, [in_features, out_features].
    """

    parameter: nn.Parameter
    name: str
    transposed: bool

    def change(self, base: BaseModel) -> Tensor:
        """Returns the present weight minus the one in the base's files, float32, as the method declares it."""
        present = self.parameter.detach()
        change = present - base.tensor(self.name).to(present)
        return change.t().contiguous() if self.transposed else change


def own_weights(
    method: Method, config: Any, base: BaseModel, model: nn.Module, specs: Mapping[str, ParameterSpec]
) -> dict[str, OwnWeight]:
    """Returns the weights that are trained in place of declared changes, made trainable; none where changes are.

    Args:
        base: reads the base's files.
        specs: what the method declares.
    Raises:
        PluginError: the method's hook names other parameters than it declares, or of other shapes.
    """
    named = method.weights(config, base)
    plain = all(parameter.dtype in DTYPES for parameter in model.parameters())
    if not (named and base.name and plain and _embeds_plainly(base, model)):
        return {}
    found = {name: _own_weight(base, model, own) for name, own in named.items()}
    shapes = {name: _shape(own) for name, own in found.items()}
    if shapes != {name: tuple(spec.shape) for name, spec in specs.items()}:
        raise PluginError(
            f"plugin {method.plugin!r}: deltamux_weights names other parameters than deltamux_parameters declares, or "
            "base parameters of other shapes",
            metadata={"plugin": method.plugin, "hook": "deltamux_weights"},
        )
    for own in found.values():
        own.parameter.data = base.tensor(own.name).to(own.parameter.device, torch.float32)
        own.parameter.requires_grad_(True)
    return found


def _own_weight(base: BaseModel, model: nn.Module, name: str) -> OwnWeight:
    module, _, field = name.rpartition(".")
    site: Any = base.sites.get((SiteKind.LINEAR, module))
    return OwnWeight(model.get_parameter(name), name, field == "weight" and site is not None and site.transposed)


def _shape(own: OwnWeight) -> tuple[int, ...]:
    shape = tuple(own.parameter.shape)
    return shape[::-1] if own.transposed else shape


@torch.no_grad()
def _embeds_plainly(base: BaseModel, model: nn.Module) -> bool:
    """Tells whether the embedding's output is its rows: where it is scaled, a row's change is not the output's."""
    embedding: Any = model.get_submodule(base.embedding.name)
    ids = torch.arange(min(8, base.embedding.vocab_size), device=embedding.weight.device)
    return torch.equal(embedding(ids), F.embedding(ids, embedding.weight))
