"""`Binding`: from the sites of a base model to the modules of the same model as vLLM has loaded it.

vLLM renames Hugging Face's module paths and fuses projections (``qkv_proj``), and says so in ``hf_to_vllm_mapper`` and
``packed_modules_mapping``, or does not. Names are tried first; what a module computes decides (`probes`). No model
is treated by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from deltamux.deltas import (
    AttentionSite,
    BaseModel,
    BaseSupport,
    BlockRole,
    BlockSite,
    EmbeddingSite,
    ExpertsSite,
    HeadSite,
    LinearSite,
    NormSite,
    Op,
    Program,
    Site,
    SiteKind,
)
from deltamux.deltas.backends.module_batch import ColumnRange, PackedSlice
from deltamux.engine.vllm.layers.attention import AttentionWithDeltas
from deltamux.engine.vllm.layers.current_step import CurrentStep
from deltamux.engine.vllm.layers.embedding import EmbeddingWithDeltas
from deltamux.engine.vllm.layers.expert_probes import check_experts
from deltamux.engine.vllm.layers.experts import ExpertsWithDeltas
from deltamux.engine.vllm.layers.head import HeadWithDeltas
from deltamux.engine.vllm.layers.linear import BlockInput, LinearWithDeltas, SubLayer
from deltamux.engine.vllm.layers.module_ops import ModuleOps, OpGroup, SiteOps, group_ops
from deltamux.engine.vllm.layers.norm import NormWithDeltas
from deltamux.engine.vllm.layers.probes import ProbeError, Probes, layer_of


class ModulePlacement(NamedTuple):
    """The ops of one program at one module."""

    module: ModuleOps
    groups: tuple[OpGroup, ...]


class Binding:
    """The layers with deltas of a loaded model, by site.

    Attributes:
        sites: the ops of each site, by (kind, name of site).
        linears: the projections, by path in vLLM's model.
        unbound: sites of the base that have no counterpart in the loaded model, with the reason.
        attentions: the attention layers, by site.
        embedding_scale: by how much the base's embeddings are larger than what vLLM's module returns.
    """

    def __init__(
        self,
        model: nn.Module,
        base: BaseModel,
        current: CurrentStep,
        probes: Probes,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sites: dict[tuple[SiteKind, str], SiteOps] = {}
        self.unbound: dict[tuple[SiteKind, str], str] = {}
        self.attentions: dict[str, AttentionWithDeltas] = {}
        self._intercepts = False
        self._model = model
        self._modules = dict(model.named_modules())
        self._path = _path_mapping(model, self._modules, set() if probes.files is None else probes.files.prefixes())
        self._probes = probes
        self._current = current
        self.embedding_scale = 1.0
        self.linears: dict[str, LinearWithDeltas] = {}
        self._paths: dict[str, str] = {}
        self._orders: dict[str, Tensor] = {}
        self._norms: dict[str, NormWithDeltas] = {}
        self._columns = dict(_columns(self._modules, getattr(model, "packed_modules_mapping", {})))
        self._absorbed = {m.kv_b_proj for m in self._modules.values() if isinstance(m, MLAAttention)}
        self._kind = (num_slots, dtype, device)
        self._mixers = [site.name for site in base.linears if site.block is BlockRole.MIXER]
        self._bind_linears([site for site in base.sites.values() if isinstance(site, LinearSite)])
        for kind, bind in self._binders().items():
            for site in base.sites.values():
                if isinstance(site, kind):
                    self._try_bind(site, bind)
        self._bind_experts(base.experts)

    def intercept(self, wanted: bool) -> None:
        """Puts the attention layers' deltas into the steps to come, or takes them out; see `AttentionWithDeltas`."""
        if wanted != self._intercepts:
            self._intercepts = wanted
            for attention in self.attentions.values():
                attention.intercept(wanted)

    def group_by_module(self, program: Program) -> tuple[ModulePlacement, ...]:
        """Returns the program's ops by module, as they are loaded into a slot."""
        by_module: dict[ModuleOps, list[tuple[int, Op]]] = {}
        for site, op in program:
            module, index = self.sites[op.site_kind, site]
            by_module.setdefault(module, []).append((index, op))
        return tuple(ModulePlacement(module, group_ops(ops)) for module, ops in by_module.items())

    def adapted(self, program: Program) -> Program:
        """Returns the program for vLLM's model: in its order of outputs, and in its scale of embeddings."""
        if self.embedding_scale == 1.0 and not self._orders:
            return program
        return Program.of((site, self._adapted(site, op)) for site, op in program)

    def _adapted(self, site: str, op: Op) -> Op:
        if op.site_kind is SiteKind.LINEAR and site in self._orders:
            return op.reordered(self._orders[site])
        if op.site_kind is SiteKind.EMBEDDING:
            return replace(op, **{name: tensor / self.embedding_scale for name, tensor in op.tensors().items()})
        return op

    def support(self) -> BaseSupport:
        """Returns which ops the model takes."""
        packed = {layer.ops for layer in self.linears.values() if layer.is_packed}
        blocks = (bound.site for bound in self.sites.values() if isinstance(bound.site, BlockSite))
        return BaseSupport(
            frozenset((str(kind), name) for kind, name in self.sites),
            {(str(kind), name): reason for (kind, name), reason in self.unbound.items()},
            reordered=frozenset(self._orders),
            packed=frozenset(name for (_, name), bound in self.sites.items() if bound.module in packed),
            without_norm=frozenset(block.name for block in blocks if block.norm not in self._norms),
            scaled_embedding=self.embedding_scale != 1.0,
        )

    def _make_ops(self, *slices: PackedSlice) -> ModuleOps:
        return ModuleOps(slices, *self._kind)

    def _binders(self) -> Mapping[type[Site], Callable[..., ModuleOps]]:
        """Returns how each kind of site is bound, in an order in which what one needs is there before it."""
        return {
            NormSite: self._bind_norm,
            BlockSite: self._bind_block,
            AttentionSite: self._bind_attention,
            EmbeddingSite: self._bind_embedding,
            HeadSite: self._bind_head,
        }

    def _try_bind(self, site: Site, bind: Callable[..., ModuleOps]) -> None:
        try:
            self.sites[site.kind, site.name] = SiteOps(bind(site), 0)
        except ProbeError as error:
            self.unbound[site.kind, site.name] = str(error)

    def _bind_linears(self, sites: Sequence[LinearSite]) -> None:
        modules: dict[str, list[PackedSlice]] = {}
        for site in sites:
            try:
                path, columns = self._find_linear(site)
            except ProbeError as error:
                self.unbound[site.kind, site.name] = str(error)
            else:
                self._paths[site.name] = path
                modules.setdefault(path, []).append(PackedSlice(site, columns))
        for path, slices in modules.items():
            ops = self._make_ops(*sorted(slices, key=lambda each: each.columns))
            self.linears[path] = LinearWithDeltas(self._modules[path], self._current, ops)
            for index, each in enumerate(ops.slices):
                self.sites[each.site.kind, each.site.name] = SiteOps(ops, index)

    def _find_linear(self, site: LinearSite) -> tuple[str, ColumnRange]:
        """Returns the path and the columns of a site's projection, by its name or else by what modules compute."""
        path, first, stop = self._named(site)
        if stop - first == site.out_features:
            found = path, ColumnRange(first, stop - first)
            order = self._probes.check_linear(site, self._modules[path], found[1])
            if order is not None:
                self._orders[site.name] = order
        else:
            paths = {each for each, _, _ in self._columns.values() if layer_of(each) == site.layer}
            searched = self._probes.find_linear(site, {each: self._modules[each] for each in sorted(paths)})
            if searched is None:
                raise _missing(site)
            found = searched
        if site.is_router:
            self._check_router(site, self._modules[found[0]])
        if self._modules[found[0]] in self._absorbed:
            raise ProbeError(f"vLLM computes {site.name} as a part of its attention, not as a projection of its own")
        return found

    def _named(self, site: LinearSite) -> tuple[str, int, int]:
        """Returns path, first and end column of the projection of a site's name; ("", 0, 0) where none has it."""
        parent, _, own = site.name.rpartition(".")
        # vLLM's mapping of a quantised base leads from a projection to the one that it is packed into.
        names = (self._path(site.name), f"{self._path(parent)}.{own}")
        return next((self._columns[name] for name in names if name in self._columns), ("", 0, 0))

    def _check_router(self, site: LinearSite, module: nn.Module) -> None:
        if any(isinstance(m, MoERunner) and m._fse_fuse_gate for m in self._modules.values()):
            raise ProbeError(f"vLLM multiplies by the weight of {site.name} together with another, not by the module")
        self._probes.check_dtype(site, module)

    def _bind_block(self, site: BlockSite) -> ModuleOps:
        reader, writer = (self.linears.get(self._paths.get(m, "")) for m in (site.input_module, site.output_module))
        if reader is None or writer is None or writer.writes is not None:
            raise _missing(site)
        ops, read = self._site_ops(site, site.features), BlockInput()
        if site.norm in self._norms:
            self._norms[site.norm].feeds = read
        reader.reads.append(read)
        writer.end(SubLayer(ops, read))
        return ops

    def _bind_norm(self, site: NormSite) -> ModuleOps:
        module = self._module(site)
        adds_residual = self._probes.check_norm(site, module)
        ops = self._site_ops(site, site.features)
        self._norms[site.name] = NormWithDeltas(module, self._current, ops, adds_residual=adds_residual)
        return ops

    def _bind_embedding(self, site: EmbeddingSite) -> ModuleOps:
        module = self._module(site)
        self.embedding_scale = self._probes.embedding_scale(site, module)
        ops = self._site_ops(site, site.features)
        EmbeddingWithDeltas(module, self._current, ops)
        return ops

    def _bind_head(self, site: HeadSite) -> ModuleOps:
        # Inside the language model, where the base reads images as well.
        processors = [m for m in self._modules.values() if isinstance(m, LogitsProcessor) and not m.logits_as_input]
        if len(processors) != 1:
            raise _missing(site)
        ops = self._site_ops(site, site.vocab_size)
        head = HeadWithDeltas(processors[0], self._current, ops)
        self._probes.check_head(site, lambda hidden: head.projected(self._model, hidden))
        return ops

    def _bind_attention(self, site: AttentionSite) -> ModuleOps:
        if self._mixers:
            raise ProbeError(
                f"virtual tokens at {site.module} would change the state of {self._mixers[0]}, which keeps no keys"
            )
        if site.first_position:
            raise ProbeError(
                f"the base counts positions from {site.first_position} on and vLLM from 0: the keys of {site.module} "
                "would be at another distance from virtual tokens"
            )
        module = self._attention(site)
        if (module.num_kv_heads, module.head_size) != (site.num_kv_heads, site.head_dim):
            raise ProbeError(
                f"vLLM's cache of {site.module} has {module.num_kv_heads} heads of {module.head_size} values, and the "
                f"base's {site.num_kv_heads} of {site.head_dim}"
            )
        for name, order in self._orders.items():
            if name.startswith(f"{site.module}.") and not _keeps_heads(order, site.head_dim):
                raise ProbeError(f"vLLM holds the values of each head of {name} in another order than the base")
        ops = self._site_ops(site, site.num_kv_heads * site.head_dim)
        self.attentions[site.name] = AttentionWithDeltas(module, self._current, ops)
        return ops

    def _bind_experts(self, sites: Sequence[ExpertsSite]) -> None:
        for path in dict.fromkeys(site.module for site in sites):
            members = [site for site in sites if site.module == path]
            try:
                made = self._experts_ops(members)
            except ProbeError as error:
                self.unbound.update({(site.kind, site.name): str(error) for site in members})
            else:
                self.sites.update({(site.kind, site.name): SiteOps(made[site], 0) for site in members})

    def _experts_ops(self, sites: Sequence[ExpertsSite]) -> Mapping[ExpertsSite, ModuleOps]:
        """Returns the ops of the projections of one module's experts."""
        found = [
            m for path, m in self._modules.items() if isinstance(m, RoutedExperts) and layer_of(path) == sites[0].layer
        ]
        if len(found) != 1:
            raise _missing(sites[0])
        projections, weights = check_experts(sites, found[0], self._probes.files)
        made = {site: self._site_ops(site, site.out_features) for site in sites}
        ends = [self._make_ops() if site is None else made[site] for site in projections]
        ExpertsWithDeltas(found[0], self._current, weights, *ends)
        return made

    def _attention(self, site: AttentionSite) -> Attention:
        """Returns the attention layer inside the site's module, or else the only one of the same decoder layer."""
        named = f"{self._path(site.module)}."
        attentions = {path: m for path, m in self._modules.items() if isinstance(m, Attention)}
        inside = [m for path, m in attentions.items() if path.startswith(named)]
        found = inside or [m for path, m in attentions.items() if layer_of(path) == site.layer]
        if len(found) != 1:
            raise _missing(site)
        return found[0]

    def _module(self, site: Site) -> nn.Module:
        module: nn.Module | None = self._modules.get(self._path(site.name))
        if module is None:
            raise _missing(site)
        return module

    def _site_ops(self, site: Site, features: int) -> ModuleOps:
        """Returns the ops of a module that belongs to one site alone."""
        return self._make_ops(PackedSlice(site, ColumnRange(0, features)))


def _keeps_heads(order: Tensor, head_dim: int) -> bool:
    """Returns whether an order of outputs moves whole heads, and nothing inside of one."""
    if len(order) % head_dim:
        return False
    heads = order.view(-1, head_dim)
    return bool((heads == heads[:, :1] + torch.arange(head_dim)).all())


def _missing(site: Site) -> ProbeError:
    return ProbeError(f"vLLM's model has no counterpart of {site.name}")


def _path_mapping(
    model: nn.Module, modules: Collection[str], prefixes: Collection[tuple[str, str]]
) -> Callable[[str], str]:
    """Returns what turns a path of Hugging Face's model into one of vLLM's, as far as vLLM says so.

    Args:
        prefixes: of paths, in Hugging Face's model and in the checkpoint, which vLLM maps the names of.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)

    def mapped(path: str) -> str:
        name: str | None = mapper.map_name(f"{path}.weight") if mapper is not None else None
        return path if name is None else name.removesuffix(".weight")

    def found(path: str) -> str:
        whole = f".{path}"
        stored = [
            f"{other}{whole.removeprefix(f'.{own}' if own else '')}".removeprefix(".")
            for own, other in sorted(prefixes)
            if not own or whole.startswith(f".{own}.")
        ]
        return next((each for name in (path, *stored) if (each := mapped(name)) in modules), mapped(path))

    return found


def _columns(
    modules: Mapping[str, nn.Module], packed: Mapping[str, list[str]]
) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Yields (Hugging Face path, (vLLM path, first column, end column)) of every projection."""
    for path, module in modules.items():
        if not isinstance(module, LinearBase):
            continue
        sizes: list[int] = getattr(module, "output_partition_sizes", None) or [module.output_size]
        parent, _, own = path.rpartition(".")
        names = packed.get(own, [own])
        if len(names) != len(sizes):
            names, sizes = [own], [sum(sizes)]
        start = 0
        for name, size in zip(names, sizes, strict=True):
            yield f"{parent}.{name}", (path, start, start + size)
            start += size
