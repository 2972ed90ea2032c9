"""Finds the sites of any Hugging Face decoder by walking its modules; no model is known by name.

It relies on what decoders share: one ``ModuleList`` holds the layers; in a layer, a child named ``*attn*`` or
``*attention*`` holds the attention's projections, one named as in `MIXERS` those of another mixer of tokens, and every
other projection belongs to the feed-forward; the last registered projection back to the hidden size is a sub-layer's
output.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltamux.deltas.embedding_path import takes_embeddings
from deltamux.deltas.sites import (
    AttentionSite,
    BlockRole,
    BlockSite,
    EmbeddingSite,
    ExpertsSite,
    HeadSite,
    LinearSite,
    NormForm,
    NormSite,
    Site,
)
from deltamux.errors import FailedPreconditionError

UNBOUNDED = 2**20
"""Positions of a base without attention, which has no longest sequence."""


MIXERS = ("mamba", "mixer", "linear_attn", "ssm", "conv", "recurrent")
"""What the names of sub-layers contain that mix tokens without attention."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a decoder that sites and methods need, whatever its config calls them."""

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        text = config.get_text_config()
        heads = int(getattr(text, "num_attention_heads", None) or 1)  # a base without attention has none
        return cls(
            hidden_size=int(text.hidden_size),
            num_layers=int(text.num_hidden_layers),
            num_attention_heads=heads,
            num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            vocab_size=int(text.vocab_size),
            max_position=int(getattr(text, "max_position_embeddings", None) or UNBOUNDED),
        )


def discover(model: nn.Module, dims: Dimensions) -> Iterator[Site]:
    """Yields every site of `model` (weights may be on the meta device).

    Raises:
        FailedPreconditionError: the model is not a decoder of the usual structure.
    """
    embedding_name, embedding = _input_embedding(model)
    scale = float(getattr(embedding, "scalar_embed_scale", 1.0))
    modules = list(_decoder_modules(model, embedding_name))
    layers_name, layers = _layers(model, modules, dims)
    first = _first_position(model)
    takes = takes_embeddings(model, embedding, layers[0])
    yield EmbeddingSite(embedding_name, dims.vocab_size, embedding.embedding_dim, scale, takes)
    for index, layer in enumerate(layers):
        for site in _layer_sites(f"{layers_name}.{index}", index, layer, dims):
            yield replace(site, first_position=first) if isinstance(site, AttentionSite) else site
    for name, module in modules:
        if not name.startswith(f"{layers_name}.") and _is_norm(module, dims):
            yield _norm_site(name, None, module, dims)
    yield from _head_site(model, embedding_name, embedding)


def _first_position(model: Any) -> int:
    """Returns the position that a model gives to a sequence's first token, as it prepares it for generation."""
    zeros = torch.zeros(1, 1, dtype=torch.long)
    try:
        prepared = model.prepare_inputs_for_generation(zeros, position_ids=zeros)
        return int(prepared["position_ids"].min())
    except Exception:  # the code of many models, of which some prepare no positions
        return 0


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is a projection, and returns its product alone: Llama 4's router does not."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    return type(module).forward in (nn.Linear.forward, Conv1D.forward) or _returns_a_tensor(module)


def _returns_a_tensor(module: Any) -> bool:
    try:
        with torch.no_grad():
            return isinstance(module(module.weight.new_zeros(1, module.in_features)), torch.Tensor)
    except Exception:  # a quantised one, that does not run on its device
        return True


def _decoder_modules(model: nn.Module, embedding_name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of the decoder: those beside its embedding, where a model also has an encoder of images."""
    config: Any = model.config
    beside = "" if config.get_text_config() is config else embedding_name.rpartition(".")[0]
    return ((name, module) for name, module in model.named_modules() if name.startswith(beside))


def _layers(model: nn.Module, modules: Iterable[tuple[str, nn.Module]], dims: Dimensions) -> tuple[str, nn.ModuleList]:
    for name, module in modules:
        if isinstance(module, nn.ModuleList) and len(module) == dims.num_layers:
            return name, module
    raise FailedPreconditionError(
        f"{type(model).__name__} has no list of {dims.num_layers} decoder layers; deltamux serves decoders that keep "
        "their layers in one ModuleList",
        reason="UNSUPPORTED_BASE",
    )


def _input_embedding(model: nn.Module) -> tuple[str, nn.Embedding]:
    wanted = model.get_input_embeddings()  # type: ignore[operator]  # PreTrainedModel's method, hidden by nn.Module's __getattr__
    for name, module in model.named_modules():
        if module is wanted:
            return name, module
    raise FailedPreconditionError(f"{type(model).__name__} has no input embedding", reason="UNSUPPORTED_BASE")


def _head_site(model: nn.Module, embedding_name: str, embedding: nn.Embedding) -> Iterator[HeadSite]:
    head = model.get_output_embeddings()  # type: ignore[operator]  # PreTrainedModel's method, hidden by nn.Module's __getattr__
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear) and module.bias is None:
            tied_to = embedding_name if module.weight is embedding.weight else None
            yield HeadSite(name, module.in_features, module.out_features, tied_to)


def _layer_sites(path: str, index: int, layer: nn.Module, dims: Dimensions) -> Iterator[Site]:
    roles = {name: _role(name) for name, child in layer.named_children()}
    linears: dict[BlockRole, list[LinearSite]] = {role: [] for role in BlockRole}
    norms: list[str] = []
    for name, module in layer.named_modules():
        if is_linear(module):
            role = roles[name.partition(".")[0]]
            linears[role].append(_linear_site(f"{path}.{name}", index, role, module))
        elif _is_norm(module, dims):
            norms.append(f"{path}.{name}")
            yield _norm_site(norms[-1], index, module, dims)
    yield from _expert_sites(path, index, layer, dims)
    norms_before = _norms_before(layer, norms)
    for role, members in linears.items():
        yield from members
        if role is not BlockRole.MIXER:
            yield from _block_site(index, role, members, dims, norms_before.get(role))
    if linears[BlockRole.ATTENTION]:
        attention = linears[BlockRole.ATTENTION][0].name.removeprefix(f"{path}.").partition(".")[0]
        yield AttentionSite(f"layers.{index}.attention", f"{path}.{attention}", dims.num_kv_heads, dims.head_dim, index)


def _role(child: str) -> BlockRole:
    """Returns the role of a decoder layer's child, by its name."""
    name = child.lower()
    if any(mixer in name for mixer in MIXERS):
        return BlockRole.MIXER
    return BlockRole.ATTENTION if "attn" in name or "attention" in name else BlockRole.FEED_FORWARD


def _linear_site(name: str, layer: int, role: BlockRole, module: nn.Module) -> LinearSite:
    transposed = isinstance(module, Conv1D)
    weight: Any = module.weight
    out_features, in_features = (weight.shape[1], weight.shape[0]) if transposed else weight.shape
    return LinearSite(name, in_features, out_features, module.bias is not None, transposed, layer, role)


def _expert_sites(path: str, index: int, layer: nn.Module, dims: Dimensions) -> Iterator[ExpertsSite | LinearSite]:
    """Yields the projections of a mixture's experts, and the router that chooses among them."""
    counts: dict[str, int] = {}
    for name, module in layer.named_modules():
        sites = [
            site
            for field, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
            and (site := _experts_site(f"{path}.{name}.{field}", index, parameter, module, dims)) is not None
        ]
        yield from sites
        counts.update({name.rpartition(".")[0]: site.num_experts for site in sites})
    for name, module in layer.named_modules():
        weight = module._parameters.get("weight")
        experts = counts.get(name.rpartition(".")[0])
        if experts and weight is not None and not is_linear(module) and weight.shape == (experts, dims.hidden_size):
            has_bias = module._parameters.get("bias") is not None
            sizes = (dims.hidden_size, experts, has_bias, False)
            yield LinearSite(f"{path}.{name}", *sizes, index, BlockRole.FEED_FORWARD, is_router=True)


def _experts_site(
    name: str, layer: int, parameter: nn.Parameter, module: nn.Module, dims: Dimensions
) -> ExpertsSite | None:
    """Returns the site of a parameter [num_experts, ., .]; None where its inputs cannot be told from its outputs."""
    num_experts, first, second = parameter.shape
    declared = getattr(module, "is_transposed", None)
    transposed = declared
    if declared is None:
        hidden = dims.hidden_size
        if (first == hidden) == (second == hidden):
            return None
        writes = "down" in name.rpartition(".")[2]  # the projection back to the hidden size
        transposed = (second == hidden) if writes else (first == hidden)
    ends = (first, second) if transposed else (second, first)
    return ExpertsSite(name, num_experts, *ends, bool(transposed), declared is not None, layer)


def _norms_before(layer: nn.Module, norms: list[str]) -> dict[BlockRole, str]:
    """Returns the norm before each sub-layer, where there is one for each: attention comes first."""
    after = norms[:1] and norms[0].rpartition(".")[2].startswith("post_")
    if len(norms) != 2 or after or not getattr(layer, "do_layer_norm_before", True):
        return {}
    return {BlockRole.ATTENTION: norms[0], BlockRole.FEED_FORWARD: norms[1]}


def _block_site(
    layer: int, role: BlockRole, members: list[LinearSite], dims: Dimensions, norm: str | None
) -> Iterator[BlockSite]:
    readers = [s for s in members if s.in_features == dims.hidden_size]
    writers = [s for s in members if s.out_features == dims.hidden_size]
    if readers and writers:
        writer = writers[-1].name
        # Of the writer's own siblings, where there are any: a router of the same sub-layer may run after them.
        own = [s for s in readers if s.name.rpartition(".")[0] == writer.rpartition(".")[0]]
        ends = ((own or readers)[0].name, writer)
        yield BlockSite(f"layers.{layer}.{role}", dims.hidden_size, role, *ends, layer, norm)


def _is_norm(module: nn.Module, dims: Dimensions) -> bool:
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and weight is not None and tuple(weight.shape) == (dims.hidden_size,) and _takes_one_input(module)


def _takes_one_input(module: nn.Module) -> bool:
    """Returns whether a module runs on one tensor: a norm with a gate beside it does not."""
    given = inspect.signature(module.forward).parameters.values()
    return sum(each.default is each.empty and each.kind is not each.VAR_KEYWORD for each in given) == 1


def _norm_site(name: str, layer: int | None, module: nn.Module, dims: Dimensions) -> NormSite:
    form = NormForm.LAYER if _centres(module) else NormForm.RMS
    eps: Any = getattr(module, "variance_epsilon", None) or getattr(module, "eps", 1e-6)
    has_bias = getattr(module, "bias", None) is not None
    return NormSite(name, dims.hidden_size, form, float(eps), has_bias, layer)


def _centres(module: nn.Module) -> bool:
    """Returns whether a norm subtracts the mean, and so returns the same for inputs that differ by a constant."""
    if isinstance(module, nn.LayerNorm):
        return True
    small = copy.deepcopy(module).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(0.5)
        x = torch.linspace(-1.0, 1.0, next(small.parameters()).shape[-1])[None]
        return torch.allclose(small(x), small(x + 1.0), atol=1e-3)
