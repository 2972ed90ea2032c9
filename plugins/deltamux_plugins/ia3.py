"""IA3: trained factors at keys, values and the feed-forward's inner activations.

Liu et al. 2022, https://arxiv.org/abs/2205.05638.

    y = l * (W x + b),  l [out]      at attention's targets
    y = W (l * x) + b,  l [in]       at the feed-forward's targets

Served as `Scale` and `ScaleInput`. Files are PEFT's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, BlockRole, Checkpoint, LinearSite, Op, Program, Scale, ScaleInput
from deltamux.errors import InvalidAdapterError, listed
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins import adapterhub
from deltamux_plugins.configs import invalid
from deltamux_plugins.peft_defaults import IA3_FEEDFORWARD, IA3_TARGETS, Names, default_targets, model_types
from deltamux_plugins.peft_format import CAUSAL_LM, PREFIX, refuse_to_train
from deltamux_plugins.targets import is_left_out, matches, nothing_matches

KEYS_AND_VALUES = ("k_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")


@dataclass(frozen=True)
class IA3Config:
    """PEFT's IA3Config.

    Attributes:
        target_modules: names, endings or a regular expression; None: PEFT's default for the base's model type, or,
            without one, keys, values and each feed-forward's output projection.
        feedforward_modules: targets whose input is scaled instead of their output: endings of paths, or a regular
            expression; None: PEFT's default.
        modules_to_save: see `deltamux_plugins.targets.Targeted`.
        init_ia3_weights: whether fresh factors are one; False draws them, for tests.
    """

    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    feedforward_modules: tuple[str, ...] | str | None = None
    init_ia3_weights: bool = True
    modules_to_save: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        inputs, targets = self.feedforward_modules, self.target_modules
        if isinstance(inputs, tuple) and isinstance(targets, tuple) and not set(inputs) <= set(targets):
            problem = f"({listed(inputs, chars=80)}) must all be among target_modules ({listed(targets, chars=80)})"
            raise invalid("feedforward_modules", problem)


# Train.


@hookimpl
def deltamux_parameters(config: IA3Config, base: BaseModel) -> dict[str, ParameterSpec]:
    refuse_to_train(config, "modules_to_save")
    init = torch.nn.init.ones_ if config.init_ia3_weights else torch.nn.init.normal_
    return {
        name: ParameterSpec((1, site.in_features) if scales_input else (site.out_features, 1), init)
        for site, scales_input, name in _targets(config, base)
    }


@hookimpl
def deltamux_config(config: IA3Config, base: BaseModel) -> dict[str, Any]:
    targets = list(_targets(config, base))
    if config.target_modules is None or config.feedforward_modules is None:
        # Endings of two components, since both of GPT-2's output projections are named c_proj.
        endings = {ending(site) for site, _, _ in targets}
        inputs = {ending(site) for site, scales_input, _ in targets if scales_input}
        config = replace(config, target_modules=tuple(sorted(endings)), feedforward_modules=tuple(sorted(inputs)))
    return {**asdict(config), **CAUSAL_LM, "fan_in_fan_out": any(site.transposed for site, _, _ in targets)}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: IA3Config, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    def op(site: LinearSite, scales_input: bool, name: str) -> Op:
        factor = tensors[name]
        expected = (1, site.in_features) if scales_input else (site.out_features, 1)
        if tuple(factor.shape) != expected:
            raise InvalidAdapterError(
                f"{name} has shape {list(factor.shape)}, not {list(expected)}: it was made for another base, or "
                "feedforward_modules is not what it was trained with",
                metadata={"tensor": name},
            )
        return ScaleInput(factor.reshape(-1)) if scales_input else Scale(factor.reshape(-1))

    return Program.of((site.name, op(site, scales_input, name)) for site, scales_input, name in _targets(config, base))


def _targets(config: IA3Config, base: BaseModel) -> Iterator[tuple[LinearSite, bool, str]]:
    """Yields (site, whether its input is scaled, tensor's name)."""
    names, inputs = _names(config, base)
    found = False
    for site in base.linears:
        if not is_left_out(config, site.name) and matches(names, site.name):
            found = True
            scales_input = matches(inputs, site.name) if isinstance(inputs, str) else site.name.endswith(inputs)
            yield site, scales_input, f"{PREFIX}{site.name}.ia3_l"
    if not found:
        raise nothing_matches(names, [site.name for site in base.linears], base, "projection")


def _names(config: IA3Config, base: BaseModel) -> tuple[Names, Names]:
    """Returns target_modules and feedforward_modules, PEFT's defaults where they are None."""
    known = any(kind in IA3_TARGETS for kind in model_types(base.architecture))
    names, inputs = config.target_modules, config.feedforward_modules
    outputs = tuple(block.output_module for block in base.blocks if block.role is BlockRole.FEED_FORWARD)
    if names is None and not known:
        names = tuple(s.name for s in base.linears if s.name in outputs or s.name.endswith(KEYS_AND_VALUES))
    elif names is None:
        names = default_targets(IA3_TARGETS, base)
    if inputs is None:
        inputs = default_targets(IA3_FEEDFORWARD, base) if known else outputs
    return names, inputs


def ending(site: LinearSite) -> str:
    return ".".join(site.name.split(".")[-2:])


@hookimpl
def deltamux_recognise(checkpoint: Checkpoint) -> Checkpoint | None:
    return adapterhub.recognise(checkpoint, "IA3")


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="ia3",
        title="IA3",
        summary="factors at keys, values and the feed-forward's inner activations",
        paper="https://arxiv.org/abs/2205.05638",
        peft_type="IA3",
        config_class=IA3Config,
        ignored_keys=frozenset({"fan_in_fan_out"}),
        merges=True,
        in_peft=True,
        learning_rate=3e-3,
        learning_rate_source="Liu et al. 2022, section 3.5: 3e-3",
    )
