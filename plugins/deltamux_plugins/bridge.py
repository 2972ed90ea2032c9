"""The bridge: a method for the adapters of PEFT's other methods, where PEFT can merge them.

PEFT itself builds the adapter around the base's projections and merges it; the difference of the weights is the delta.

    dW = merged(W) - W        as `LowRank` where a small rank holds it exactly, else as `Dense`;  db likewise as `Bias`

Each projection is then compared with PEFT's own output on random input, so that a method whose merging is not its
inference (one that depends on the token, say) is refused instead of served wrongly. PEFT must be installed
(``pip install peft``); it is not needed for the methods that deltamux has itself.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

import torch
from torch import Tensor, nn

from deltamux.deltas import BaseModel, Bias, Checkpoint, Dense, LinearSite, LowRank, Op, Program
from deltamux.errors import (
    BaseMismatchError,
    DeltamuxError,
    FailedPreconditionError,
    InvalidAdapterError,
    InvalidConfigError,
    UnknownMethodError,
)
from deltamux.hookspecs import BOOKKEEPING, MethodInfo, ParameterSpec, hookimpl
from deltamux.patterns import match
from deltamux_plugins.configs import invalid
from deltamux_plugins.peft_defaults import model_types
from deltamux_plugins.peft_format import PREFIX
from deltamux_plugins.targets import fully_matches, is_all_linear

OWN_TYPE = "DELTAMUX_BRIDGE"
RANK = 64
"""Largest rank of a `LowRank` that a change becomes."""

EXACT = 1e-5
"""Largest share of a change that a low rank may leave out: float32's rounding."""

TOLERANCE = 1e-3
MAX_PATTERNS = 512
"""Of one option; PEFT compiles each again for every module where there are more."""

NOT_SERVED = {
    "ADAPTION_PROMPT": "adds a gated attention over trained prompts to the upper layers",
    "CARTRIDGE": "puts trained keys and values of its own layout before the cache",
    "CPT": "trains the embeddings of its prompt's tokens",
    "MULTITASK_PROMPT_TUNING": "chooses a soft prompt by a task that each request names",
    "POLY": "mixes several adapters by a task that each request names",
    "SHADOW": "runs a second, smaller network next to the base",
    "TRAINABLE_TOKENS": "changes rows of the token embedding, and of the output head where the two are tied",
    "XLORA": "mixes several LoRAs by a classifier that reads the base's hidden states",
}
"""What PEFT's types do that are not changes of projections' weights."""

UNSTABLE = {"FROD": "factors the base's weights anew when PEFT loads it, by a decomposition that rounding changes"}
"""Why two processes of PEFT load a type's file with different effects: what it computes then is not in the file."""

ADVICE = "LoRA, IA3, prompt tuning, P-tuning and prefix tuning are served, and every type of PEFT that can be merged"


@dataclass(frozen=True)
class BridgeConfig:
    """PEFT's config of any type.

    Attributes:
        values: the keys of its adapter_config.json, ``peft_type`` among them.
    """

    values: Mapping[str, Any] = field(default_factory=dict)


@hookimpl
def deltamux_recognise(checkpoint: Checkpoint) -> Checkpoint | None:
    kind = checkpoint.config.get("peft_type")
    if isinstance(kind, str) and kind in NOT_SERVED:
        raise UnknownMethodError(
            f"adapters of PEFT's type {kind} are not served: it {NOT_SERVED[kind]}, which is not a change of "
            f"projections' weights. {ADVICE}",
            reason="METHOD_NOT_SERVED",
            metadata={"field": "peft_type", "peft_type": kind},
        )
    if isinstance(kind, str) and kind in UNSTABLE:
        raise UnknownMethodError(
            f"adapters of PEFT's type {kind} are not served: it {UNSTABLE[kind]}, so that even PEFT itself gives other "
            "outputs where threads or libraries differ. Merge it with PEFT, where it was trained, and serve that model",
            reason="METHOD_NOT_SERVED",
            metadata={"field": "peft_type", "peft_type": kind},
        )
    if not isinstance(kind, str) or kind not in _types():
        return None
    return Checkpoint(
        {"values": dict(checkpoint.config), "peft_type": OWN_TYPE}, checkpoint.tensors, checkpoint.metadata
    )


@cache
def _types() -> frozenset[str]:
    """Returns the types that PEFT, where it is installed, can build.

    PEFT's import takes seconds of a core, for which a file with an invented type would make other uploads wait: the one
    module that lists the types is run by itself.
    """
    package = find_spec("peft")
    if package is None or package.origin is None:
        return frozenset()
    kinds = run_path(str(Path(package.origin).parent / "utils" / "peft_types.py"))["PeftType"]
    return frozenset(kind.value for kind in kinds)


@hookimpl
def deltamux_parameters(config: BridgeConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    raise InvalidConfigError(
        "the bridge serves what PEFT trained, and trains nothing itself: train with PEFT, or by another method here"
    )


@hookimpl
def deltamux_program(config: BridgeConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    adapted = _adapted(config, base, tensors)
    kind, placements = config.values.get("peft_type"), list[tuple[str, Op]]()
    inputs = {site.name: torch.randn(4, site.in_features) for site in base.linears}
    outputs = {name: adapted.get_submodule(PREFIX + name)(x) for name, x in inputs.items()}
    try:
        merged = adapted.merge_and_unload()
    except Exception as error:
        raise InvalidAdapterError(f"PEFT cannot merge {kind} into weights: {type(error).__name__}: {error}") from error
    for site in base.linears:
        module = merged.get_submodule(site.name)
        placements += ((site.name, op) for op in _changes(base, site, module))
        if not torch.allclose(module(inputs[site.name]), outputs[site.name], atol=TOLERANCE, rtol=TOLERANCE):
            raise InvalidAdapterError(
                f"{kind} cannot be bridged: at {site.name}, PEFT's merged weights do not give PEFT's own output; the "
                "method is more than a change of weights",
                metadata={"site": site.name, "peft_type": str(kind)},
            )
    return Program.of(placements)


def _adapted(config: BridgeConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Any:
    """Returns PEFT's model around the base's projections alone, with the checkpoint loaded."""
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError:
        raise FailedPreconditionError(
            f"adapters of type {config.values.get('peft_type')} are served through PEFT, which is not installed: "
            "pip install peft",
            reason="PEFT_MISSING",
        ) from None
    kind = peft.PeftType(str(config.values["peft_type"]))
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    try:
        own = config_class(**_named(_values(config, {field.name for field in fields(config_class)}), base))
        model = peft.get_peft_model(_projections(base), own).eval()
    except DeltamuxError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:400]
        raise InvalidConfigError(
            f"PEFT {peft.__version__} does not build this {kind.value} adapter on {base.architecture}: {problem}"
        ) from error
    expected = get_peft_model_state_dict(model)
    for name, tensor in expected.items():
        if tuple(tensors[name].shape) != tuple(tensor.shape):
            raise BaseMismatchError(
                f"{name} has shape {list(tensors[name].shape)}, but this base needs {list(tensor.shape)}",
                metadata={"tensor": name},
            )
    set_peft_model_state_dict(
        model, {n: tensors[n].float() if tensors[n].is_floating_point() else tensors[n] for n in expected}
    )
    return model


def _values(config: BridgeConfig, known: set[str]) -> dict[str, Any]:
    """Returns the values of the keys that PEFT's config class has; others must be unset.

    Raises:
        InvalidConfigError: one is set that it lacks.
    """
    values = {key: value for key, value in config.values.items() if key not in BOOKKEEPING | {"peft_type"}}
    for key, value in values.items():
        if key not in known and value not in (None, False, "", [], {}):
            raise InvalidConfigError(
                f"PEFT's {config.values['peft_type']} has no option {key[:80]!r}, and would ignore its value "
                f"{value!r:.80}: delete it from adapter_config.json if the adapter was trained without it",
                metadata={"field": key},
            )
    return {key: value for key, value in values.items() if key in known}


def _named(values: dict[str, Any], base: BaseModel) -> dict[str, Any]:
    """Returns the values with modules by path, where an upload has regular expressions: PEFT sets them no time limit.

    Raises:
        InvalidConfigError: one is not a regular expression, or takes too long.
    """
    paths, named = [site.name for site in base.linears], dict(values)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(names := values.get(key), str) and not is_all_linear(names):
            named[key] = [path for path in paths if fully_matches(names, path)]
    if values.get("layers_to_transform") and (pattern := values.get("layers_pattern")):
        for each in (pattern,) if isinstance(pattern, str) else pattern:
            any(match(rf".*\.{each}\.(\d+)\.", path) for path in paths)  # refuses what takes too long
    for key, patterns in values.items():
        if key.endswith("_pattern") and isinstance(patterns, dict):
            _check_patterns(key, patterns, paths)
    return named


def _check_patterns(key: str, patterns: Mapping[str, Any], paths: list[str]) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise invalid(key, f"has {len(patterns)} entries; at most {MAX_PATTERNS} are taken")
    for pattern in patterns:
        if not re.fullmatch(r"[\w.-]+", pattern):
            any(match(f"{start}({pattern})", path) for start in (r"(.*\.)?", ".*") for path in paths)


def _projections(base: BaseModel) -> nn.Module:
    """Returns a tree of modules that holds the base's projections at their paths, in float32."""
    from transformers.pytorch_utils import Conv1D

    root = _Tree()
    # By it PEFT finds the default targets.
    root.config = {"model_type": next(iter(model_types(base.architecture)), "custom")}
    for site in base.linears:
        module: Any
        if site.transposed:
            module = Conv1D(site.out_features, site.in_features)  # type: ignore[no-untyped-call]  # transformers'
        else:
            module = nn.Linear(site.in_features, site.out_features, bias=site.has_bias)
        with torch.no_grad():
            module.weight.copy_(base.tensor(f"{site.name}.weight"))
            if site.has_bias:
                module.bias.copy_(base.tensor(f"{site.name}.bias"))
        *parents, own = site.name.split(".")
        parent: nn.Module = root
        for name in parents:
            if name not in dict(parent.named_children()):
                parent.add_module(name, _Tree())
            parent = parent.get_submodule(name)
        parent.add_module(own, module)
    return root


class _Tree(nn.Module):
    """A module that only holds others at their paths."""

    config: dict[str, str]


def _changes(base: BaseModel, site: LinearSite, module: Any) -> Iterator[Op]:
    change = module.weight.detach() - base.tensor(f"{site.name}.weight").float()
    change = change.t() if site.transposed else change
    if change.any():
        yield _smallest(change.contiguous())
    if module.bias is not None and site.has_bias:
        moved = module.bias.detach() - base.tensor(f"{site.name}.bias").float()
        if moved.any():
            yield Bias(moved)
    elif module.bias is not None:
        yield Bias(module.bias.detach())


def _smallest(change: Tensor) -> LowRank | Dense:
    """Returns the change as factors, where these are smaller and exact."""
    rank = min(RANK, *change.shape)
    u, s, v = torch.svd_lowrank(change, q=rank, niter=2)
    needed = int((s > EXACT * s[0]).sum())
    a, b = v[:, :needed].t() * s[:needed].unsqueeze(1), u[:, :needed]
    small = needed * sum(change.shape) < change.numel()
    if small and (change - b @ a).norm() <= EXACT * change.norm():
        return LowRank(a.contiguous(), b.contiguous())
    return Dense(change)


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="bridge",
        title="PEFT bridge",
        summary="serves any other of PEFT's methods that can be merged",
        paper="https://github.com/huggingface/peft",
        peft_type=OWN_TYPE,
        config_class=BridgeConfig,
        merges=True,
        in_peft=True,
        trains=False,
        learning_rate=1e-3,
        learning_rate_source="trains nothing",
    )
