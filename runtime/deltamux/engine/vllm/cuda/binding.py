"""`CudaBinding`: a binding whose modules have static buffers wherever their kind has kernels."""

from itertools import pairwise

from torch import nn

from deltamux.deltas import BaseModel, BlockSite, EmbeddingSite, LinearSite, NormSite, SiteKind
from deltamux.deltas.backends.module_batch import PackedSlice
from deltamux.deltas.backends.triton.bottleneck import BottleneckDeltas
from deltamux.deltas.backends.triton.norm import NormDeltas
from deltamux.deltas.backends.triton.virtual import SoftPromptDeltas
from deltamux.deltas.ops import StepIndex
from deltamux.engine.vllm.cuda.module_ops import BufferSizes, CudaLinearOps, CudaModuleOps, CudaSiteOps
from deltamux.engine.vllm.cuda.profiles import GraphProfile
from deltamux.engine.vllm.layers.binding import Binding
from deltamux.engine.vllm.layers.current_step import CurrentStep
from deltamux.engine.vllm.layers.module_ops import ModuleOps
from deltamux.engine.vllm.layers.probes import Probes


class CudaBinding(Binding):
    """The layers with deltas of a model on a GPU, by site."""

    def __init__(
        self, model: nn.Module, base: BaseModel, current: CurrentStep, probes: Probes, sizes: BufferSizes
    ) -> None:
        self._sizes = sizes
        super().__init__(model, base, current, probes, sizes.num_slots, sizes.dtype, sizes.device)
        for linear in self.linears.values():
            # As `LinearWithDeltas.forward` has it: the projection that ends a sub-layer is the only reader of its
            # input.
            if linear.writes is not None and isinstance(linear.ops, CudaLinearOps) and not linear.is_packed:
                linear.ops.own_input()

    def warm_up(self, step: StepIndex) -> None:
        """Launches every kernel of every module once; `step` has no row of an adapter."""
        for module in {id(site.module): site.module for site in self.sites.values()}.values():
            if isinstance(module, CudaModuleOps):
                module.warm_up(step)

    def profile(self, slot: int) -> GraphProfile | None:
        """Returns what a CUDA graph must hold for the ops in a slot; None where no graph can."""
        needed = GraphProfile.BASE
        for (kind, _), (module, _) in self.sites.items():
            # Keys and values belong to virtual tokens, whose steps run in no graph; logits are computed outside of all.
            if not module.mask & (1 << slot) or kind in (SiteKind.ATTENTION, SiteKind.HEAD):
                continue
            profile = module.profile(slot) if isinstance(module, CudaModuleOps) else None
            if profile is None:
                return None
            needed = max(needed, profile)
        return needed

    def _make_ops(self, *slices: PackedSlice) -> ModuleOps:
        sizes, first, site = self._sizes, slices[0], slices[0].site
        kind = (sizes.num_slots, sizes.dtype, sizes.device)
        if isinstance(site, NormSite):
            return CudaSiteOps(first, sizes, NormDeltas(site, *kind), GraphProfile.ALL)
        if isinstance(site, BlockSite):
            return CudaSiteOps(first, sizes, BottleneckDeltas(site, *sizes), GraphProfile.ALL)
        if isinstance(site, EmbeddingSite):
            return CudaSiteOps(first, sizes, SoftPromptDeltas(site, *kind), GraphProfile.BASE)
        adjoin = all(sum(before.columns) == after.columns.first for before, after in pairwise(slices))
        return CudaLinearOps(slices, sizes) if isinstance(site, LinearSite) and adjoin else super()._make_ops(*slices)
