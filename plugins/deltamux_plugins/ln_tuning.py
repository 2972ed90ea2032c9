"""LN tuning: the norms' weights and biases are trained, nothing else.

Zhao et al. 2023, https://arxiv.org/abs/2312.11420.

    y = normalise(x) * w' + b',   w', b' [features]

Served as `NormAffine` (which holds the change). Files are PEFT's, which hold the new values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from deltamux.deltas import BaseModel, NormAffine, NormSite, Program
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.peft_defaults import LN_TARGETS, default_targets
from deltamux_plugins.peft_format import AS_PEFT, CAUSAL_LM, PREFIX, copy_of, refuse_to_train, shaped
from deltamux_plugins.targets import is_left_out, matches, nothing_matches

ALL_NORMS = "all-norms"


@dataclass(frozen=True)
class LNTuningConfig:
    """PEFT's LNTuningConfig.

    Attributes:
        target_modules: names, endings or a regular expression; "all-norms"; None: PEFT's default for the base's model
            type.
        exclude_modules: as target_modules; takes precedence.
        modules_to_save: see `deltamux_plugins.targets.Targeted`.
    """

    target_modules: tuple[str, ...] | str | None = ALL_NORMS
    exclude_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] | None = None


# Train.


@hookimpl
def deltamux_parameters(config: LNTuningConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    refuse_to_train(config, "modules_to_save")
    return {
        name: ParameterSpec((site.features,), copy_of(base, f"{site.name}.{field}"))
        for site in _targets(config, base)
        for field, name in _tensors(site)
    }


@hookimpl
def deltamux_config(config: LNTuningConfig, base: BaseModel) -> dict[str, Any]:
    names = tuple(sorted({site.name.rpartition(".")[2] for site in _targets(config, base)}))
    named = config if config.target_modules not in (None, ALL_NORMS) else replace(config, target_modules=names)
    return {**asdict(named), **CAUSAL_LM}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: LNTuningConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    def op(site: NormSite) -> NormAffine:
        changes = {
            field: shaped(tensors, name, (site.features,), base)
            - base.tensor(f"{site.name}.{field}").to(tensors[name].dtype)
            for field, name in _tensors(site)
        }
        return NormAffine(**changes)

    return Program.of((site.name, op(site)) for site in _targets(config, base))


def _tensors(site: NormSite) -> Iterator[tuple[str, str]]:
    """Yields (parameter, PEFT's tensor name)."""
    for field in ("weight", "bias") if site.has_bias else ("weight",):
        yield field, f"{PREFIX}{site.name}.ln_tuning_layers.{field}"


def _targets(config: LNTuningConfig, base: BaseModel) -> list[NormSite]:
    names = default_targets(LN_TARGETS, base) if config.target_modules is None else config.target_modules
    targets = [
        site
        for site in base.norms
        if (names == ALL_NORMS or matches(names, site.name)) and not is_left_out(config, site.name)
    ]
    if not targets:
        raise nothing_matches(names, [site.name for site in base.norms], base, "norm")
    return targets


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="ln_tuning",
        title="LN tuning",
        summary="weights and biases of the norms",
        paper="https://arxiv.org/abs/2312.11420",
        peft_type="LN_TUNING",
        config_class=LNTuningConfig,
        file_defaults=AS_PEFT,
        merges=True,
        in_peft=True,
        learning_rate=3e-3,
        learning_rate_source="of the order of IA3's, which trains as few parameters",
    )
