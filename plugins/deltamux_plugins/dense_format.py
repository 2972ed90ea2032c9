"""The files of methods that train whole weights: changes against the base, plain or compressed, tensor by tensor.

A parameter's change has the parameter's name (``model.layers.0.mlp.up_proj.weight``), or, for a projection's weight,
compressed: as ``.weight.signs`` and ``.weight.scale`` (BitDelta: one bit per weight, one scale per matrix), or as
``.weight.a`` and ``.weight.b`` (truncated SVD). A tied output head has no tensor of its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from deltamux.deltas import (
    BaseModel,
    Bias,
    Dense,
    DenseEmbedding,
    DenseHead,
    EmbeddingSite,
    HeadSite,
    LinearSite,
    LowRank,
    NormAffine,
    NormSite,
    Op,
    Program,
    SignDense,
)
from deltamux.errors import InvalidAdapterError
from deltamux.hookspecs import ParameterSpec

WeightSite = LinearSite | NormSite | EmbeddingSite | HeadSite


class Change(NamedTuple):
    """One parameter that is trained."""

    site: WeightSite
    field: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.site.name}.{self.field}"


def changes_of(site: WeightSite) -> Iterator[Change]:
    """Yields the parameters of a site."""
    if isinstance(site, NormSite):
        yield Change(site, "weight", (site.features,))
    elif isinstance(site, LinearSite):
        yield Change(site, "weight", (site.out_features, site.in_features))
    else:
        yield Change(site, "weight", (site.vocab_size, _width(site)))
    if isinstance(site, LinearSite | NormSite) and site.has_bias:
        features = site.out_features if isinstance(site, LinearSite) else site.features
        yield Change(site, "bias", (features,))


def layer_changes(base: BaseModel, layers: Iterable[int], *, norms: bool = True) -> list[Change]:
    """Returns the parameters of some decoder layers."""
    wanted = set(layers)
    sites: list[WeightSite] = [site for site in base.linears if site.layer in wanted]
    if norms:
        sites += [norm for norm in base.norms if norm.layer in wanted]
    return [change for site in sites for change in changes_of(site)]


def outer_changes(base: BaseModel, *, embedding: bool, final_norm: bool, head: bool) -> list[Change]:
    """Returns the parameters outside the layers; a tied head is trained with the embedding."""
    sites: list[WeightSite] = [base.embedding] if embedding else []
    if final_norm:
        sites += [norm for norm in base.norms if norm.layer is None]
    if head and base.head is not None and base.head.tied_to is None:
        sites.append(base.head)
    return [change for site in sites for change in changes_of(site)]


def zeros(changes: Iterable[Change]) -> dict[str, ParameterSpec]:
    """Returns the declarations of changes that start at zero."""
    return {change.name: ParameterSpec(change.shape, torch.nn.init.zeros_) for change in changes}


def dense_program(base: BaseModel, changes: Iterable[Change], tensors: Mapping[str, Tensor]) -> Program:
    """Returns the program of a file's changes."""
    return Program.of((site, op) for change in changes for site, op in _ops(base, change, tensors))


def _ops(base: BaseModel, change: Change, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Op]]:
    site, name = change.site, change.name
    if isinstance(site, NormSite):
        yield site.name, NormAffine(**{change.field: tensors[name]})
    elif change.field == "bias":
        yield site.name, Bias(tensors[name])
    elif isinstance(site, HeadSite):
        yield site.name, DenseHead(tensors[name])
    elif isinstance(site, EmbeddingSite):
        yield site.name, DenseEmbedding(tensors[name])
        if base.head is not None and base.head.tied_to == site.name:
            yield base.head.name, DenseHead(tensors[name])
    else:
        yield site.name, _weight_op(name, tensors)


def _weight_op(name: str, tensors: Mapping[str, Tensor]) -> Op:
    if f"{name}.signs" in tensors:
        scale = tensors[f"{name}.scale"]
        if scale.numel() != 1:
            raise InvalidAdapterError(
                f"{name}.scale has shape {list(scale.shape)}, but is one number", metadata={"tensor": f"{name}.scale"}
            )
        return SignDense(tensors[f"{name}.signs"], float(scale))
    if f"{name}.a" in tensors:
        return LowRank(tensors[f"{name}.a"], tensors[f"{name}.b"])
    return Dense(tensors[name])


def _width(site: EmbeddingSite | HeadSite) -> int:
    return site.in_features if isinstance(site, HeadSite) else site.features
