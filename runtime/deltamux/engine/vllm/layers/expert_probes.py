"""Whether vLLM's experts are the base's, and computed as `ExpertWeights` does; the reason where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from deltamux.deltas import ExpertsSite
from deltamux.deltas.weights import WeightFiles
from deltamux.engine.vllm.layers.expert_weights import GATES, LAYOUTS, ExpertGroups, ExpertWeights
from deltamux.engine.vllm.layers.probes import ProbeError

ROWS = 6
SAMPLE = 4
"""Experts that are compared with the checkpoint, spread evenly over all."""
TOLERANCE = {torch.float32: 1e-3}
ROUNDED_TOLERANCE = 0.03
"""Of outputs, relative to their size, in float32 and in narrower dtypes; another weight's differ by 1.4."""


class ExpertSites(NamedTuple):
    """The two projections of the experts of one module; None where the base has no site for one."""

    gate_up: ExpertsSite | None
    down: ExpertsSite | None


def check_experts(
    sites: Sequence[ExpertsSite], module: RoutedExperts, files: WeightFiles | None
) -> tuple[ExpertSites, ExpertWeights]:
    """Finds the sites' projections in a module of vLLM's, and how it holds them.

    Raises:
        ProbeError: the module computes something else than the base, or in a way that no delta can be added to.
    """
    check_kind(sites[0], module)
    hidden, config = module.hidden_size, module.moe_config
    size = config.intermediate_size_per_partition_unpadded or config.intermediate_size_per_partition
    by_ends = {(site.in_features, site.out_features): site for site in sites}
    found = ExpertSites(by_ends.pop((hidden, 2 * size), None), by_ends.pop((size, hidden), None))
    if by_ends:
        raise ProbeError(f"vLLM's experts have no projection of the shape of {next(iter(by_ends.values())).name}")
    weights = _computed(module, size)
    if weights is None:
        raise ProbeError(f"vLLM computes the experts of {sites[0].module} in a way that takes no deltas")
    if files is not None:
        _check_weights(found, weights, files)
    return found, weights


def check_kind(site: ExpertsSite, module: RoutedExperts) -> None:
    """Raises ProbeError for experts that cannot be computed apart from vLLM's kernel."""
    name = site.module
    if not isinstance(module.quant_method, UnquantizedFusedMoEMethod):
        raise ProbeError(f"the experts of {name} are quantised here, and take no deltas: serve the base unquantised")
    if module.quant_method.is_monolithic:
        raise ProbeError(f"vLLM routes and computes the experts of {name} in one kernel, which takes no deltas")
    if module.expert_map is not None or module.global_num_experts != site.num_experts:
        raise ProbeError(f"vLLM distributes or replicates the experts of {name}, which then take no deltas")
    activation, limit = module.activation, getattr(module, "swiglu_limit", None)
    if activation not in GATES or (limit is not None and activation is not MoEActivation.SWIGLUOAI):
        raise ProbeError(f"the experts of {name} have the activation {activation.value}, which deltas do not know here")


def _computed(module: RoutedExperts, size: int) -> ExpertWeights | None:
    """Returns the weights in the layout in which they compute what the module does; None where there is none."""
    generator = torch.Generator().manual_seed(0)
    weight = module.get_parameter("w13_weight")
    x = torch.randn(ROWS, module.hidden_size, generator=generator).to(weight.dtype).to(weight.device)
    x[0] *= 30  # where activations are limited
    scores = torch.rand(ROWS, module.global_num_experts, generator=generator)
    shares, ids = scores.topk(module.top_k)
    shares = shares.to(weight.device)
    dtype = module.quant_method.topk_indices_dtype or torch.int32
    try:
        with torch.inference_mode():
            expected = module.forward_modular(x, shares, ids.to(dtype).to(weight.device))
            assert isinstance(expected, Tensor), "the sum over the experts is left to another kernel"
            expected = expected.float()
    except Exception as error:
        raise ProbeError(f"vLLM's experts do not run on their own: {type(error).__name__}: {error}") from error
    for layout in LAYOUTS.values():
        weights = ExpertWeights(module, layout, size)
        try:
            found = _summed(weights, x, shares, ids.to(weight.device))
        except RuntimeError:  # the sizes do not go with the layout
            continue
        errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
        if bool((errors <= TOLERANCE.get(weight.dtype, ROUNDED_TOLERANCE)).all()):
            return weights
    return None


def _summed(weights: ExpertWeights, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
    experts, order = torch.sort(ids.flatten())
    tokens, scale = order // ids.shape[1], shares.flatten()[order].unsqueeze(1)
    on_input = weights.module.apply_router_weight_on_input
    rows = x[tokens] * scale.to(x.dtype) if on_input else x[tokens]
    groups = ExpertGroups.of(experts, weights.module.global_num_experts)
    outputs = weights.down(weights.activated(weights.gate_up(rows, groups)), groups).float()
    return torch.zeros_like(x, dtype=torch.float32).index_add_(0, tokens, outputs if on_input else outputs * scale)


def _check_weights(sites: ExpertSites, weights: ExpertWeights, files: WeightFiles) -> None:
    """Raises ProbeError unless the module's weights are the checkpoint's, expert by expert and row by row."""
    for index, site in enumerate(sites):
        if site is None:
            continue
        chosen = torch.linspace(0, site.num_experts - 1, min(SAMPLE, site.num_experts)).long().tolist()
        try:
            stored = files.experts(site.name, chosen)
        except KeyError:
            raise ProbeError(f"the checkpoint has no {site.name} to compare vLLM's experts with") from None
        stored = stored.mT if site.transposed else stored
        for expert, weight in zip(chosen, stored, strict=True):
            own = weights.stored(expert)[index].cpu()
            if own.shape != weight.shape or not torch.equal(own, weight.to(own.dtype)):
                raise ProbeError(f"vLLM's experts hold something else than the checkpoint's {site.name}")
