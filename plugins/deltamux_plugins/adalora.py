"""AdaLoRA: LoRA whose ranks are allocated by importance while it trains.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512.

    y = W x + s B (E * A x),   A [r, in], E [r, 1], B [out, r],   s = alpha / (init_r + 1e-5)

Every projection starts with `init_r` triplets (row of A, value of E, column of B); those of least importance (section
3.2: sensitivity times uncertainty, both smoothed) are pruned along a cubic schedule, until `target_r` per projection
are left on average. A penalty keeps A and B near orthogonal (equation 4).

Served as `LowRank` with the ranks that are left. Files are PEFT's, pruned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, LinearSite, LowRank, Op, Program
from deltamux.errors import InvalidAdapterError
from deltamux.hookspecs import MethodInfo, ParameterSpec, TrainingSchedule, hookimpl
from deltamux_plugins.configs import invalid
from deltamux_plugins.lora import IGNORED as IGNORED_BY_LORA
from deltamux_plugins.peft_defaults import ADALORA_TARGETS, Names
from deltamux_plugins.peft_format import AS_PEFT, PREFIX, refuse_to_train
from deltamux_plugins.peft_keys import ADALORA_REFUSED
from deltamux_plugins.targets import Targeted, fan_in_fan_out, peft_values, targets

EPSILON = 1e-5
"""Added to the rank that the scale is divided by, as in PEFT."""


@dataclass(frozen=True)
class AdaLoRAConfig(Targeted):
    """PEFT's AdaLoraConfig.

    Attributes:
        target_r: mean rank per projection that is left.
        init_r: rank that every projection starts with.
        lora_alpha: numerator of the scale.
        lora_dropout: while training.
        tinit: updates before the pruning begins; None takes a tenth of the run.
        tfinal: updates after it has ended; None takes three tenths of the run.
        deltaT: updates from one pruning to the next.
        beta1, beta2: smoothing of sensitivity and uncertainty.
        orth_reg_weight: of the orthogonality penalty.
        total_step: updates of the run; None takes what the trainer makes.
        rank_pattern: which of the init_r triplets are left, by tensor; written at the end.
    """

    peft_targets: ClassVar[Mapping[str, Names]] = ADALORA_TARGETS

    target_r: int = 8
    init_r: int = 12
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, tuple[bool, ...]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.target_r <= self.init_r:
            raise invalid("target_r", f"is from 1 to init_r {self.init_r}, not {self.target_r}")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise invalid("beta1", f"and beta2 lie between 0 and 1, not {self.beta1} and {self.beta2}")
        if self.deltaT < 1 or self.orth_reg_weight < 0 or not 0 <= self.lora_dropout < 1:
            raise invalid("deltaT", "is at least 1, orth_reg_weight at least 0, lora_dropout a probability below 1")

    @property
    def scale(self) -> float:
        return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + EPSILON)

    def rank(self, site: LinearSite) -> int:
        pattern = (self.rank_pattern or {}).get(f"{site.name}.lora_E")
        return self.init_r if pattern is None else sum(pattern)


# Train.


@hookimpl
def deltamux_parameters(config: AdaLoRAConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    def small(tensor: Tensor) -> None:
        torch.nn.init.normal_(tensor, std=0.02)

    refuse_to_train(config, "modules_to_save")
    parameters: dict[str, ParameterSpec] = {}
    for site in targets(config, base):
        a, e, b = _names(site)
        parameters[a] = ParameterSpec((config.init_r, site.in_features), small)
        parameters[e] = ParameterSpec((config.init_r, 1), torch.nn.init.zeros_)
        parameters[b] = ParameterSpec((site.out_features, config.init_r), small)
    return parameters


@hookimpl
def deltamux_schedule(config: AdaLoRAConfig, base: BaseModel, num_steps: int) -> TrainingSchedule:
    return RankSchedule(config, [site.name for site in targets(config, base)], num_steps)


class RankSchedule(TrainingSchedule):
    """The pruning of triplets to the budget of each step, by importance; `state` has what it is computed from."""

    def __init__(self, config: AdaLoRAConfig, sites: list[str], num_steps: int) -> None:
        super().__init__()
        total = config.total_step or num_steps
        first = config.tinit if config.tinit is not None else total // 10
        last = config.tfinal if config.tfinal is not None else (3 * total) // 10
        self._config = replace(config, total_step=total, tinit=first, tfinal=last)
        self._sites = sites
        self._first, self._end = first, max(total - last, first + 1)

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        distances = []
        for name, tensor in parameters.items():
            if name.endswith(("lora_A", "lora_B")):
                gram = tensor @ tensor.t() if name.endswith("lora_A") else tensor.t() @ tensor
                distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self._config.orth_reg_weight * torch.stack(distances).mean()

    def after_update(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        if step < self._end:
            self._observe(parameters)
        if step > self._end:
            self._mask(parameters)
        elif step == self._end or (step > self._first and step % self._config.deltaT == 0):
            self._prune(self.budget(step), parameters)

    def budget(self, step: int) -> int:
        """Returns how many triplets may be left after an update (equation 12)."""
        initial, target = (r * len(self._sites) for r in (self._config.init_r, self._config.target_r))
        if step <= self._first:
            return initial
        left = max(0.0, 1 - (step - self._first) / (self._end - self._first))
        return int(target + (initial - target) * left**3)

    def finish(
        self, config: AdaLoRAConfig, tensors: Mapping[str, Tensor]
    ) -> tuple[AdaLoRAConfig, Mapping[str, Tensor]]:
        kept: dict[str, Tensor] = {}
        pattern: dict[str, tuple[bool, ...]] = {}
        for site in self._sites:
            alive = self._alive(site, tensors)
            pattern[f"{site}.lora_E"] = tuple(bool(a) for a in alive)
            a, e, b = _names(site)
            kept |= {a: tensors[a][alive], e: tensors[e][alive], b: tensors[b][:, alive]}
        return replace(self._config, rank_pattern=pattern), kept

    def _observe(self, parameters: Mapping[str, Tensor]) -> None:
        for name, tensor in parameters.items():
            if tensor.grad is None:
                continue
            present = (tensor * tensor.grad).abs()
            sensitivity = self._smooth(f"sensitivity.{name}", present, self._config.beta1)
            self._smooth(f"uncertainty.{name}", (present - sensitivity).abs(), self._config.beta2)

    def _smooth(self, key: str, value: Tensor, beta: float) -> Tensor:
        before = self.state.get(key)
        smoothed = (1 - beta) * value if before is None else beta * before.to(value.device) + (1 - beta) * value
        self.state[key] = smoothed
        return smoothed

    def _prune(self, budget: int, parameters: Mapping[str, Tensor]) -> None:
        """Keeps the `budget` most important triplets of all projections, and zeroes the values of the others."""
        if f"sensitivity.{_names(self._sites[0])[0]}" not in self.state:
            return
        scores = torch.stack([self._importance(site) for site in self._sites])
        alive = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        alive[scores.flatten().topk(budget).indices] = True
        for site, own in zip(self._sites, alive.view(scores.shape), strict=True):
            self.state[f"alive.{site}"] = own
        self._mask(parameters)

    def _importance(self, site: str) -> Tensor:
        """Returns the importance of each triplet of a projection, [init_r] (equation 8)."""
        a, e, b = (self.state[f"sensitivity.{n}"] * self.state[f"uncertainty.{n}"] for n in _names(site))
        return e.view(-1) + a.mean(1) + b.mean(0)

    def _mask(self, parameters: Mapping[str, Tensor]) -> None:
        for site in self._sites:
            value = parameters[_names(site)[1]]
            value.masked_fill_(~self._alive(site, parameters).unsqueeze(1), 0.0)

    def _alive(self, site: str, tensors: Mapping[str, Tensor]) -> Tensor:
        value = tensors[_names(site)[1]]
        alive = self.state.get(f"alive.{site}")
        return (
            torch.ones(len(value), dtype=torch.bool, device=value.device) if alive is None else alive.to(value.device)
        )


@hookimpl
def deltamux_config(config: AdaLoRAConfig, base: BaseModel) -> dict[str, Any]:
    values = peft_values(config, base)
    values["rank_pattern"] = {name: list(alive) for name, alive in (config.rank_pattern or {}).items()} or None
    values.update(total_step=config.total_step or 1, tinit=config.tinit or 0, tfinal=config.tfinal or 0)
    if values["tinit"] >= values["total_step"] - values["tfinal"]:
        values.update(tinit=0, tfinal=0)  # PEFT refuses a schedule without room for pruning, also when it only loads
    return {**values, **fan_in_fan_out(config, base)}


# Inference, and merging through the ops.


@hookimpl
def deltamux_program(config: AdaLoRAConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    placements: list[tuple[str, Op]] = []
    for site in targets(config, base):
        a, e, b = (tensors[name] for name in _names(site))
        rank = config.rank(site)
        if a.dim() != 2 or a.shape[0] != rank or tuple(e.shape) != (rank, 1):
            raise InvalidAdapterError(
                f"{site.name}.lora_A has shape {list(a.shape)} and lora_E {list(e.shape)}, but adapter_config.json "
                f"leaves rank {rank}",
                reason="RANK_MISMATCH",
                metadata={"tensor": _names(site)[0], "rank": str(rank)},
            )
        if rank:
            placements.append((site.name, LowRank(a * e, b, config.scale, config.lora_dropout)))
    return Program.of(placements)


def _names(site: LinearSite | str) -> tuple[str, str, str]:
    path = site if isinstance(site, str) else site.name
    return f"{PREFIX}{path}.lora_A", f"{PREFIX}{path}.lora_E", f"{PREFIX}{path}.lora_B"


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="adalora",
        title="AdaLoRA",
        summary="low-rank factors whose ranks are allocated by importance while training",
        paper="https://arxiv.org/abs/2303.10512",
        peft_type="ADALORA",
        config_class=AdaLoRAConfig,
        ignored_keys=IGNORED_BY_LORA | {"r", "alpha_pattern", "bias", "init_lora_weights"},
        refused_keys=ADALORA_REFUSED,
        file_defaults=AS_PEFT,
        merges=True,
        in_peft=True,
        learning_rate=1e-3,
        learning_rate_source="Zhang et al. 2023, appendix C: 5e-4 to 2e-3",
        learning_rate_width=768,
    )
