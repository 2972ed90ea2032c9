"""Binds the sites of a base model to the modules of the same model as vLLM loaded it.

vLLM keeps Hugging Face's module paths, but fuses projections (``qkv_proj``) and says so in ``packed_modules_mapping``;
an attention sub-layer contains one ``Attention``. Nothing here knows a model by name.
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
from deltamux.deltas.kernels.tables import Columns
from deltamux.deltas.ops.batched import Part
from deltamux.engine.vllm.lanes import Lanes, Place, Round, rounds
from deltamux.engine.vllm.ports import (
    AttentionPort,
    BlockInput,
    CurrentStep,
    EmbeddingPort,
    HeadPort,
    LinearPort,
    NormPort,
    SubLayer,
)


class Placing(NamedTuple):
    """What one program has at one module."""

    lanes: Lanes
    rounds: tuple[Round, ...]


class Binding:
    """All ports of a loaded model, reachable by site.

    Attributes:
        lanes: where the ops of each site go, by (kind, name of site).
        linears: the ports of the projections, by path in vLLM's model.
        unbound: sites of the base that have no counterpart in the loaded model, with the reason.
        attentions: the ports of the attention layers, by site.
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
        self.lanes: dict[tuple[SiteKind, str], Place] = {}
        self.unbound: dict[tuple[SiteKind, str], str] = {}
        self.attentions: dict[str, AttentionPort] = {}
        self._intercepts = False
        self._model = model
        self._modules = dict(model.named_modules())
        self._current = current
        self.linears: dict[str, LinearPort] = {}
        self._norms: dict[str, NormPort] = {}
        self._columns = dict(_columns(self._modules, getattr(model, "packed_modules_mapping", {})))
        self._kind = (num_slots, dtype, device)
        self._bind_linears([site for site in base.sites.values() if isinstance(site, LinearSite)])
        for kind, bind in self._binders().items():
            for site in base.sites.values():
                if isinstance(site, kind):
                    self._bind(site, bind(site))

    def intercept(self, wanted: bool) -> None:
        """Puts the ports of the attention layers in the way of the steps to come, or takes them out of it."""
        if wanted != self._intercepts:
            self._intercepts = wanted
            for port in self.attentions.values():
                port.intercept(wanted)

    def arrange(self, program: Program) -> tuple[Placing, ...]:
        """Returns the program's ops by module, as a slot takes them."""
        by_module: dict[Lanes, list[tuple[int, Op]]] = {}
        for site, op in program:
            lanes, part = self.lanes[op.site_kind, site]
            by_module.setdefault(lanes, []).append((part, op))
        return tuple(Placing(lanes, rounds(ops)) for lanes, ops in by_module.items())

    def refusal(self, site: str, op: Op) -> str | None:
        """Returns why an op cannot stand at a site of this engine; None when it can."""
        if (op.site_kind, site) in self.unbound:
            return self.unbound[op.site_kind, site]
        at = self.lanes[op.site_kind, site].site if (op.site_kind, site) in self.lanes else None
        if op.reads_residual and isinstance(at, BlockSite) and at.norm not in self._norms:
            return f"vLLM's model has no norm in front of {site} that reads the residual stream"
        if op.changes_input and at is not None and len(self.lanes[op.site_kind, site].lanes.parts) > 1:
            return f"{site} is fused with other projections here, so that its input alone cannot be changed"
        return None

    def _make_lanes(self, *parts: Part) -> Lanes:
        return Lanes(parts, *self._kind)

    def _binders(self) -> Mapping[type[Site], Callable[..., Lanes | None]]:
        """Returns how each kind of site is bound, in an order in which what one needs is there before it."""
        return {
            NormSite: self._bind_norm,
            BlockSite: self._bind_block,
            AttentionSite: self._bind_attention,
            EmbeddingSite: self._bind_embedding,
            HeadSite: self._bind_head,
        }

    def _bind(self, site: Site, lanes: Lanes | None, part: int = 0) -> None:
        if lanes is None:
            self.unbound[site.kind, site.name] = f"vLLM's model has no counterpart of {site.name}"
        else:
            self.lanes[site.kind, site.name] = Place(lanes, part)

    def _bind_linears(self, sites: Sequence[LinearSite]) -> None:
        modules: dict[str, list[Part]] = {}
        for site in sites:
            path, first, stop = self._columns.get(site.name, ("", 0, 0))
            if stop - first == site.out_features:
                modules.setdefault(path, []).append(Part(site, Columns(first, stop - first)))
            else:
                self._bind(site, None)
        for path, parts in modules.items():
            lanes = self._make_lanes(*sorted(parts, key=lambda part: part.columns))
            self.linears[path] = LinearPort(self._modules[path], self._current, lanes)
            for number, part in enumerate(lanes.parts):
                self._bind(part.site, lanes, number)

    def _bind_block(self, site: BlockSite) -> Lanes | None:
        ends = [self.linears.get(self._columns.get(m, ("",))[0]) for m in (site.input_module, site.output_module)]
        reader, writer = ends
        if reader is None or writer is None or writer.writes is not None:
            return None
        lanes, read = self._whole(site, site.features), BlockInput()
        if site.norm in self._norms:
            self._norms[site.norm].feeds = read
        reader.reads.append(read)
        writer.end(SubLayer(lanes, read))
        return lanes

    def _bind_norm(self, site: NormSite) -> Lanes | None:
        module = self._modules.get(site.name)
        if module is None:
            return None
        lanes = self._whole(site, site.features)
        self._norms[site.name] = NormPort(module, self._current, lanes)
        return lanes

    def _bind_embedding(self, site: EmbeddingSite) -> Lanes | None:
        module = self._modules.get(site.name)
        if module is None:
            return None
        lanes = self._whole(site, site.features)
        EmbeddingPort(module, self._current, lanes)
        return lanes

    def _bind_head(self, site: HeadSite) -> Lanes | None:
        processor = getattr(self._model, "logits_processor", None)
        plain = processor is not None and processor.scale == 1.0 and processor.soft_cap is None
        if not plain or not hasattr(self._model, "compute_logits"):
            return None
        lanes = self._whole(site, site.vocab_size)
        HeadPort(self._model, self._current, lanes)
        return lanes

    def _bind_attention(self, site: AttentionSite) -> Lanes | None:
        inside = (m for path, m in self._modules.items() if path.startswith(f"{site.module}."))
        module = next((m for m in inside if isinstance(m, Attention)), None)
        if module is None:
            return None
        lanes = self._whole(site, site.num_kv_heads * site.head_dim)
        self.attentions[site.name] = AttentionPort(module, self._current, lanes)
        return lanes

    def _whole(self, site: Site, features: int) -> Lanes:
        """Returns the lanes of a module that belongs to one site alone."""
        return self._make_lanes(Part(site, Columns(0, features)))


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
