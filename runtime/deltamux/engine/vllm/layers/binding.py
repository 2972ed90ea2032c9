"""`Binding`: from the sites of a base model to the modules of the same model as vLLM has loaded it.

vLLM keeps Hugging Face's module paths, but fuses projections (``qkv_proj``) by its ``packed_modules_mapping``; an
attention sub-layer contains one ``Attention``. No model is treated by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase

from deltamux.deltas import (
    AttentionSite,
    BaseModel,
    BlockSite,
    EmbeddingSite,
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
from deltamux.engine.vllm.layers.head import HeadWithDeltas
from deltamux.engine.vllm.layers.linear import BlockInput, LinearWithDeltas, SubLayer
from deltamux.engine.vllm.layers.module_ops import ModuleOps, OpGroup, SiteOps, group_ops
from deltamux.engine.vllm.layers.norm import NormWithDeltas


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
    """

    def __init__(
        self,
        model: nn.Module,
        base: BaseModel,
        current: CurrentStep,
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
        self._current = current
        self.linears: dict[str, LinearWithDeltas] = {}
        self._norms: dict[str, NormWithDeltas] = {}
        self._columns = dict(_columns(self._modules, getattr(model, "packed_modules_mapping", {})))
        self._kind = (num_slots, dtype, device)
        self._bind_linears([site for site in base.sites.values() if isinstance(site, LinearSite)])
        for kind, bind in self._binders().items():
            for site in base.sites.values():
                if isinstance(site, kind):
                    self._bind(site, bind(site))

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

    def refusal(self, site: str, op: Op) -> str | None:
        """Returns why an op cannot run at a site of this engine; None when it can."""
        if (op.site_kind, site) in self.unbound:
            return self.unbound[op.site_kind, site]
        bound = self.sites.get((op.site_kind, site))
        at = bound.site if bound is not None else None
        if op.reads_residual and isinstance(at, BlockSite) and at.norm not in self._norms:
            return f"vLLM's model has no norm before {site} that reads the residual stream"
        if op.changes_input and bound is not None and len(bound.module.slices) > 1:
            return f"{site} is packed with other projections here, so that its input alone cannot be changed"
        return None

    def _make_ops(self, *slices: PackedSlice) -> ModuleOps:
        return ModuleOps(slices, *self._kind)

    def _binders(self) -> Mapping[type[Site], Callable[..., ModuleOps | None]]:
        """Returns how each kind of site is bound, in an order in which what one needs is there before it."""
        return {
            NormSite: self._bind_norm,
            BlockSite: self._bind_block,
            AttentionSite: self._bind_attention,
            EmbeddingSite: self._bind_embedding,
            HeadSite: self._bind_head,
        }

    def _bind(self, site: Site, module: ModuleOps | None, index: int = 0) -> None:
        if module is None:
            self.unbound[site.kind, site.name] = f"vLLM's model has no counterpart of {site.name}"
        else:
            self.sites[site.kind, site.name] = SiteOps(module, index)

    def _bind_linears(self, sites: Sequence[LinearSite]) -> None:
        modules: dict[str, list[PackedSlice]] = {}
        for site in sites:
            path, first, stop = self._columns.get(site.name, ("", 0, 0))
            if stop - first == site.out_features:
                modules.setdefault(path, []).append(PackedSlice(site, ColumnRange(first, stop - first)))
            else:
                self._bind(site, None)
        for path, slices in modules.items():
            ops = self._make_ops(*sorted(slices, key=lambda each: each.columns))
            self.linears[path] = LinearWithDeltas(self._modules[path], self._current, ops)
            for index, each in enumerate(ops.slices):
                self._bind(each.site, ops, index)

    def _bind_block(self, site: BlockSite) -> ModuleOps | None:
        ends = [self.linears.get(self._columns.get(m, ("",))[0]) for m in (site.input_module, site.output_module)]
        reader, writer = ends
        if reader is None or writer is None or writer.writes is not None:
            return None
        ops, read = self._site_ops(site, site.features), BlockInput()
        if site.norm in self._norms:
            self._norms[site.norm].feeds = read
        reader.reads.append(read)
        writer.end(SubLayer(ops, read))
        return ops

    def _bind_norm(self, site: NormSite) -> ModuleOps | None:
        module = self._modules.get(site.name)
        if module is None:
            return None
        ops = self._site_ops(site, site.features)
        self._norms[site.name] = NormWithDeltas(module, self._current, ops)
        return ops

    def _bind_embedding(self, site: EmbeddingSite) -> ModuleOps | None:
        module = self._modules.get(site.name)
        if module is None:
            return None
        ops = self._site_ops(site, site.features)
        EmbeddingWithDeltas(module, self._current, ops)
        return ops

    def _bind_head(self, site: HeadSite) -> ModuleOps | None:
        processor = getattr(self._model, "logits_processor", None)
        plain = processor is not None and processor.scale == 1.0 and processor.soft_cap is None
        if not plain or not hasattr(self._model, "compute_logits"):
            return None
        ops = self._site_ops(site, site.vocab_size)
        HeadWithDeltas(self._model, self._current, ops)
        return ops

    def _bind_attention(self, site: AttentionSite) -> ModuleOps | None:
        inside = (m for path, m in self._modules.items() if path.startswith(f"{site.module}."))
        module = next((m for m in inside if isinstance(m, Attention)), None)
        if module is None:
            return None
        ops = self._site_ops(site, site.num_kv_heads * site.head_dim)
        self.attentions[site.name] = AttentionWithDeltas(module, self._current, ops)
        return ops

    def _site_ops(self, site: Site, features: int) -> ModuleOps:
        """Returns the ops of a module that belongs to one site alone."""
        return self._make_ops(PackedSlice(site, ColumnRange(0, features)))


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
        if len(names) == 1:
            sizes = [sum(sizes)]
        start = 0
        for name, size in zip(names, sizes, strict=True):
            yield f"{parent}.{name}", (path, start, start + size)
            start += size
