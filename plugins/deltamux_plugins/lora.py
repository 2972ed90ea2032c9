"""LoRA: a low-rank change of chosen projections.

Hu et al. 2021, https://arxiv.org/abs/2106.09685; rsLoRA's scale: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732;
DoRA (`use_dora`): see dora.py.

    y = W x + s B (A x),   A [r, in], B [out, r],   s = alpha / r  (rsLoRA: alpha / sqrt(r))

Served as `LowRank` at every target, and as `LowRankExperts` at the experts of a mixture (`target_parameters`, see
target_parameters.py); trained biases as `Bias` and `NormAffine`. Files are PEFT's.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, Bias, Checkpoint, LinearSite, LowRank, NormAffine, NormSite, Op, Program
from deltamux.errors import InvalidAdapterError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins import adapterhub, mlx
from deltamux_plugins.configs import invalid
from deltamux_plugins.dora import magnitude_ops, row_norms
from deltamux_plugins.peft_format import AS_PEFT, PREFIX, copy_of, refuse_to_train, shaped
from deltamux_plugins.peft_keys import LORA_REFUSED
from deltamux_plugins.target_parameters import ParameterTarget, parameter_targets
from deltamux_plugins.targets import Targeted, by_pattern, fan_in_fan_out, peft_values, targets

# These initialisations move a part of the base's weights into the factors: the adapter fits its own changed base only.
CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# These only choose the first values; a trained file does not depend on them.
INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
TRAINED_FROM = (True, "gaussian")
IGNORED = frozenset([
    "corda_config", "eva_config", "fan_in_fan_out", "loftq_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config",
])  # fmt: skip


@dataclass(frozen=True)
class LoRAConfig(Targeted):
    """PEFT's LoraConfig, as far as it changes what is served.

    Attributes:
        r: rank.
        lora_alpha: numerator of the scale.
        target_parameters: parameters that are targets besides the modules, by the ends of their paths: the experts of a
            mixture (``mlp.experts.gate_up_proj``), its router (``mlp.gate.weight``), or a projection's weight.
        rank_pattern: rank by pattern over paths; the first that matches the path's end counts.
        alpha_pattern: likewise for lora_alpha.
        use_dora: each row's length is trained apart from its direction; see `deltamux_plugins.dora`.
        lora_dropout: while training.
        bias: none, all (every bias of the base is trained) or lora_only (those of the targets).
        init_lora_weights: True (A Kaiming-uniform, B zero) or "gaussian" (A normal with deviation 1/r, B zero); in
            files also PEFT's others.
    """

    target_parameters: tuple[str, ...] | None = None
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    bias: str = "none"
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(r < 1 for r in (self.r, *self.rank_pattern.values())):
            raise invalid("r", f"and rank_pattern hold positive integers, not {self.r} and {dict(self.rank_pattern)}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise invalid("lora_dropout", f"is a probability below 1, not {self.lora_dropout}")
        if self.bias not in ("none", "all", "lora_only"):
            raise invalid("bias", f"is none, all or lora_only, not {self.bias!r}")
        if self.target_parameters and (self.use_dora or self.lora_dropout):
            raise invalid("target_parameters", "goes with neither use_dora nor lora_dropout, in PEFT as here")
        self._check_initialisation()

    @property
    def has_other_targets(self) -> bool:
        return bool(self.target_parameters)

    def _check_initialisation(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, str) and init.startswith(CHANGES_THE_BASE):
            raise invalid(
                "init_lora_weights",
                f"{init!r} changes the base's weights too: save it as plain LoRA, with PEFT's save_pretrained and its "
                "path_initial_model_for_weight_conversion",
            )
        if isinstance(init, str) and init not in INITIALISATIONS:
            raise invalid("init_lora_weights", f"{init!r} is not known; known: true, {', '.join(INITIALISATIONS)}")

    def rank(self, path: str) -> int:
        """Returns the rank at the path of a module, or of a parameter."""
        rank = by_pattern(self.rank_pattern, path)
        return self.r if rank is None else int(rank)

    def scale(self, path: str) -> float:
        alpha = by_pattern(self.alpha_pattern, path)
        alpha, rank = self.lora_alpha if alpha is None else float(alpha), self.rank(path)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


# Train.


@hookimpl
def deltamux_parameters(config: LoRAConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    if config.init_lora_weights not in TRAINED_FROM:
        raise invalid("init_lora_weights", f"{config.init_lora_weights!r} cannot be trained from; use true or gaussian")
    refuse_to_train(config, "modules_to_save")
    parameters: dict[str, ParameterSpec] = {}
    for site in targets(config, base):
        rank = config.rank(site.name)
        a, b = f"{PREFIX}{site.name}.lora_A.weight", f"{PREFIX}{site.name}.lora_B.weight"
        parameters[a] = ParameterSpec((rank, site.in_features), _init_a(config, rank))
        parameters[b] = ParameterSpec((site.out_features, rank), torch.nn.init.zeros_)
        if config.use_dora:
            parameters[_magnitude(site)] = ParameterSpec((site.out_features,), _row_norms_of(base, site))
    for target in _parameters(config, base):
        rank = config.rank(target.path)
        parameters[target.a] = ParameterSpec(target.shape_a(rank), _init_a(config, rank))
        parameters[target.b] = ParameterSpec(target.shape_b(rank), torch.nn.init.zeros_)
    for site_with_bias, name in _biases(config, base):
        features = site_with_bias.out_features if isinstance(site_with_bias, LinearSite) else site_with_bias.features
        parameters[name] = ParameterSpec((features,), copy_of(base, f"{site_with_bias.name}.bias"))
    return parameters


@hookimpl
def deltamux_config(config: LoRAConfig, base: BaseModel) -> dict[str, Any]:
    return {**peft_values(config, base), **fan_in_fan_out(config, base)}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: LoRAConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    placements: list[tuple[str, Op]] = []
    parameters = _parameters(config, base)
    for site in targets(config, base):
        a = tensors[f"{PREFIX}{site.name}.lora_A.weight"]
        b = tensors[f"{PREFIX}{site.name}.lora_B.weight"]
        if a.dim() != 2 or a.shape[0] != config.rank(site.name):
            raise _rank_mismatch(site.name, a, config.rank(site.name), f"{PREFIX}{site.name}.lora_A.weight")
        low_rank = LowRank(a, b, config.scale(site.name), config.lora_dropout)
        placements.append((site.name, low_rank))
        if config.use_dora:
            low_rank.check(site)
            magnitude = shaped(tensors, _magnitude(site), (site.out_features,), base)
            placements += ((site.name, op) for op in magnitude_ops(base, site, low_rank, magnitude))
    for target in parameters:
        a, b, rank = tensors[target.a], tensors[target.b], config.rank(target.path)
        if a.dim() != 2 or a.shape[0] != target.shape_a(rank)[0]:
            raise _rank_mismatch(target.path, a, rank, target.a)
        b = shaped(tensors, target.b, target.shape_b(rank), base)
        placements.append((target.site.name, target.op(a, b, config.scale(target.path))))
    for site_with_bias, name in _biases(config, base):
        before = base.tensor(f"{site_with_bias.name}.bias")
        change = shaped(tensors, name, tuple(before.shape), base) - before.to(tensors[name].dtype)
        op: Op = Bias(change) if isinstance(site_with_bias, LinearSite) else NormAffine(bias=change)
        placements.append((site_with_bias.name, op))
    return Program.of(placements)


def _rank_mismatch(path: str, a: Tensor, rank: int, name: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"{path}.lora_A has shape {list(a.shape)}, but adapter_config.json says rank {rank}",
        reason="RANK_MISMATCH",
        metadata={"tensor": name, "rank": str(rank)},
    )


def _parameters(config: LoRAConfig, base: BaseModel) -> list[ParameterTarget]:
    if not config.target_parameters:
        return []
    return parameter_targets(config.target_parameters, base, {site.name for site in targets(config, base)})


# Biases and first values.


def _biases(config: LoRAConfig, base: BaseModel) -> Iterator[tuple[LinearSite | NormSite, str]]:
    """Yields the sites whose bias is trained, with the name of PEFT's tensor, which holds the bias's new value."""
    if config.bias == "none":
        return
    chosen = {site.name for site in targets(config, base)}
    for site in base.linears:
        if site.has_bias and site.name in chosen:
            yield site, f"{PREFIX}{site.name}.base_layer.bias"
        elif site.has_bias and config.bias == "all":
            yield site, f"{PREFIX}{site.name}.bias"
    if config.bias == "all":
        yield from ((norm, f"{PREFIX}{norm.name}.bias") for norm in base.norms if norm.has_bias)


def _init_a(config: LoRAConfig, rank: int) -> Any:
    if config.init_lora_weights == "gaussian":
        return lambda tensor: torch.nn.init.normal_(tensor, std=1 / rank)
    return lambda tensor: torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def _magnitude(site: LinearSite) -> str:
    return f"{PREFIX}{site.name}.lora_magnitude_vector"


def _row_norms_of(base: BaseModel, site: LinearSite) -> Any:
    return lambda tensor: tensor.copy_(row_norms(base, site))


@hookimpl
def deltamux_recognise(checkpoint: Checkpoint) -> Checkpoint | None:
    return adapterhub.recognise(checkpoint, "LORA") or mlx.recognise(checkpoint)


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="lora",
        title="LoRA",
        summary="low-rank factors at chosen projections",
        paper="https://arxiv.org/abs/2106.09685",
        peft_type="LORA",
        config_class=LoRAConfig,
        ignored_keys=IGNORED,
        refused_keys=LORA_REFUSED,
        file_defaults=AS_PEFT,
        merges=True,
        in_peft=True,
        learning_rate=2e-4,
        learning_rate_source="QLoRA (arXiv:2305.14314), table 9: 2e-4 up to 13B",
        learning_rate_width=4096,
    )
