"""Binds the sites of a base model to the modules of the same model as vLLM loaded it.

vLLM keeps Hugging Face's module paths, but fuses projections (``qkv_proj``) and says so in ``packed_modules_mapping``;
an attention sub-layer contains one ``Attention``. Nothing here knows a model by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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
    Site,
    SiteKind,
)
from deltamux.engine.vllm.ports import (
    AttentionPort,
    BlockInput,
    CurrentStep,
    EmbeddingPort,
    HeadPort,
    Lanes,
    LinearPort,
    NormPort,
)


class Binding:
    """All ports of a loaded model, reachable by site.

    Attributes:
        lanes: the op batches by (kind, name of site).
        unbound: sites of the base that have no counterpart in the loaded model, with the reason.
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
        self.lanes: dict[tuple[SiteKind, str], Lanes] = {}
        self.unbound: dict[tuple[SiteKind, str], str] = {}
        self._model = model
        self._modules = dict(model.named_modules())
        self._current = current
        self._linears: dict[str, LinearPort] = {}
        self._norms: dict[str, NormPort] = {}
        self._block_inputs: dict[str, BlockInput] = {}
        self._columns = dict(_columns(self._modules, getattr(model, "packed_modules_mapping", {})))
        self._new_lanes: Callable[[Site], Lanes] = lambda site: Lanes(site, num_slots, dtype, device)
        for site in base.sites.values():
            self._bind(site)
        for port in self._linears.values():
            port.parts.sort(key=lambda part: part[1])
        for norm, block in self._block_inputs.items():
            if norm in self._norms:
                self._norms[norm].feeds = block

    def refusal(self, site: str, op: Op) -> str | None:
        """Returns why an op cannot stand at a site of this engine; None when it can."""
        if (op.site_kind, site) in self.unbound:
            return self.unbound[op.site_kind, site]
        at = self.lanes[op.site_kind, site].site if (op.site_kind, site) in self.lanes else None
        if op.reads_residual and isinstance(at, BlockSite) and at.norm not in self._norms:
            return f"vLLM's model has no norm in front of {site} that reads the residual stream"
        if op.changes_input and site in self._columns and len(self._linears[self._columns[site][0]].parts) > 1:
            return f"{site} is fused with other projections here, so that its input alone cannot be changed"
        return None

    def _bind(self, site: Site) -> None:
        bind: Mapping[type[Site], Callable[..., Lanes | None]] = {
            LinearSite: self._bind_linear,
            NormSite: self._bind_norm,
            BlockSite: self._bind_block,
            AttentionSite: self._bind_attention,
            EmbeddingSite: self._bind_embedding,
            HeadSite: self._bind_head,
        }
        lanes = bind[type(site)](site)
        if lanes is None:
            self.unbound[site.kind, site.name] = f"vLLM's model has no counterpart of {site.name}"
        else:
            self.lanes[site.kind, site.name] = lanes

    def _bind_linear(self, site: LinearSite) -> Lanes | None:
        if site.name not in self._columns:
            return None
        path, start, stop = self._columns[site.name]
        if stop - start != site.out_features:
            return None
        lanes = self._new_lanes(site)
        self._linear_port(path).parts.append((lanes, start, stop))
        return lanes

    def _bind_block(self, site: BlockSite) -> Lanes | None:
        if site.input_module not in self._columns or site.output_module not in self._columns:
            return None
        lanes, block = self._new_lanes(site), BlockInput()
        if site.norm is not None:
            self._block_inputs[site.norm] = block
        self._linear_port(self._columns[site.input_module][0]).reads.append(block)
        self._linear_port(self._columns[site.output_module][0]).writes.append((lanes, block))
        return lanes

    def _bind_norm(self, site: NormSite) -> Lanes | None:
        module = self._modules.get(site.name)
        if module is None:
            return None
        lanes = self._new_lanes(site)
        self._norms[site.name] = NormPort(module, self._current, lanes)
        return lanes

    def _bind_embedding(self, site: EmbeddingSite) -> Lanes | None:
        module = self._modules.get(site.name)
        if module is None:
            return None
        lanes = self._new_lanes(site)
        EmbeddingPort(module, self._current, lanes)
        return lanes

    def _bind_head(self, site: HeadSite) -> Lanes | None:
        processor = getattr(self._model, "logits_processor", None)
        plain = processor is not None and processor.scale == 1.0 and processor.soft_cap is None
        if not plain or not hasattr(self._model, "compute_logits"):
            return None
        lanes = self._new_lanes(site)
        HeadPort(self._model, self._current, lanes)
        return lanes

    def _bind_attention(self, site: AttentionSite) -> Lanes | None:
        inside = (m for path, m in self._modules.items() if path.startswith(f"{site.module}."))
        module = next((m for m in inside if isinstance(m, Attention)), None)
        if module is None:
            return None
        lanes = self._new_lanes(site)
        AttentionPort(module, self._current, lanes)
        return lanes

    def _linear_port(self, path: str) -> LinearPort:
        if path not in self._linears:
            self._linears[path] = LinearPort(self._modules[path], self._current)
        return self._linears[path]


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
