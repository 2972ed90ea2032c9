"""BitFit: biases are trained, nothing else; the base gets them where it has none.

Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199.

    y = W x + b + d,   d [out];    norms: bias + d

Served as `Bias` and `NormAffine`. PEFT has no such method; the files have PEFT's layout and hold the change d.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, Bias, LinearSite, NormAffine, NormSite, Op, Program
from deltamux.errors import InvalidConfigError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import VersionedConfig
from deltamux_plugins.targets import matches


@dataclass(frozen=True)
class BitFitConfig(VersionedConfig):
    """The biases that are trained.

    Attributes:
        target_modules: names, endings or a regular expression over projections and norms; None takes all.
        add_missing: whether projections and norms without a bias get one (Llama has none at all).
    """

    target_modules: tuple[str, ...] | str | None = None
    add_missing: bool = True


# Train.


@hookimpl
def deltamux_parameters(config: BitFitConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    return {
        f"{site.name}.bias": ParameterSpec((_features(site),), torch.nn.init.zeros_) for site in _targets(config, base)
    }


@hookimpl
def deltamux_config(config: BitFitConfig, base: BaseModel) -> dict[str, Any]:
    return {**asdict(config), "task_type": "CAUSAL_LM"}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: BitFitConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    def op(site: LinearSite | NormSite) -> Op:
        change = tensors[f"{site.name}.bias"]
        return Bias(change) if isinstance(site, LinearSite) else NormAffine(bias=change)

    return Program.of((site.name, op(site)) for site in _targets(config, base))


def _targets(config: BitFitConfig, base: BaseModel) -> Iterator[LinearSite | NormSite]:
    sites: list[LinearSite | NormSite] = [*base.linears, *base.norms]
    chosen = [
        site
        for site in sites
        if (site.has_bias or config.add_missing)
        and (config.target_modules is None or matches(config.target_modules, site.name))
    ]
    if not chosen:
        raise InvalidConfigError(
            f"no bias of {base.architecture} is chosen; allow add_missing, or choose other target_modules",
            metadata={"field": "target_modules"},
        )
    return iter(chosen)


def _features(site: LinearSite | NormSite) -> int:
    return site.out_features if isinstance(site, LinearSite) else site.features


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="bitfit",
        title="BitFit",
        summary="biases of projections and norms, added where the base has none",
        paper="https://arxiv.org/abs/2106.10199",
        peft_type="DELTAMUX_BITFIT",
        config_class=BitFitConfig,
        merges=True,
        in_peft=False,
        learning_rate=1e-3,
        learning_rate_source="Ben Zaken et al. 2021, section 4: between 1e-4 and 1e-3",
    )
