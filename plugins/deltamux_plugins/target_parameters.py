"""PEFT's target_parameters: LoRA at parameters that are not modules, such as those of a mixture's experts.

PEFT wraps the module that holds such a parameter (``lora.ParamWrapper``), and keeps the factors of all experts in two
matrices: lora_A [num_experts * r, in], expert by expert, and lora_B [out, r * num_experts], in which the experts change
fastest. A second parameter of the same module is wrapped around the first, whose factors are then found one
``base_layer`` deeper. In and out are those of the stored parameter, which PEFT takes as [num_experts, out, in] unless
its module says otherwise.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.deltas import BaseModel, ExpertsSite, LinearSite, LowRank, LowRankExperts
from deltamux.errors import InvalidConfigError, listed
from deltamux_plugins.peft_format import PREFIX
from deltamux_plugins.targets import matches


@dataclass(frozen=True)
class ParameterTarget:
    """A parameter that LoRA changes.

    Attributes:
        path: of the parameter.
        site: what it is of.
        depth: how many other parameters of the same module are wrapped around it.
    """

    path: str
    site: ExpertsSite | LinearSite
    depth: int

    @property
    def a(self) -> str:
        """The name of lora_A in PEFT's file."""
        return self._name("lora_A")

    @property
    def b(self) -> str:
        return self._name("lora_B")

    def _name(self, factor: str) -> str:
        module = self.path.rpartition(".")[0]
        return f"{PREFIX}{module}{'.base_layer' * self.depth}.{factor}.weight"

    def shape_a(self, rank: int) -> tuple[int, int]:
        return self._num_experts * rank, self._ends[0]

    def shape_b(self, rank: int) -> tuple[int, int]:
        return self._ends[1], self._num_experts * rank

    def op(self, a: Tensor, b: Tensor, scale: float) -> LowRank | LowRankExperts:
        """Returns the change of the factors in PEFT's file."""
        if isinstance(self.site, LinearSite):
            return LowRank(a, b, scale)
        experts = self._num_experts
        a, b = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
        if self._is_swapped:
            a, b = b.mT, a.mT
        return LowRankExperts(a, b, scale)

    @property
    def _num_experts(self) -> int:
        return self.site.num_experts if isinstance(self.site, ExpertsSite) else 1

    @property
    def _is_swapped(self) -> bool:
        """Whether PEFT takes the inputs for outputs, at parameters whose layout no one declares."""
        return isinstance(self.site, ExpertsSite) and self.site.transposed and not self.site.is_declared

    @property
    def _ends(self) -> tuple[int, int]:
        """The inputs and outputs that PEFT sees."""
        ends = (self.site.in_features, self.site.out_features)
        return (ends[1], ends[0]) if self._is_swapped else ends


def parameter_targets(names: Sequence[str], base: BaseModel, modules: Collection[str]) -> list[ParameterTarget]:
    """Returns the parameters that target_parameters matches, in the model's order.

    Args:
        names: the ends of their paths.
        modules: paths of the projections that are targets themselves.
    Raises:
        InvalidConfigError: there is none, or one that LoRA cannot change.
    """
    chosen = [(path, site) for path, site in _parameters(base) if matches(tuple(names), path)]
    if not chosen:
        known = sorted({".".join(path.split(".")[-2:]) for path, _ in _parameters(base)})
        raise _invalid(
            f"({listed(list(names), chars=80)}) names no parameter of {base.architecture} that LoRA can change; this "
            f"base has: {listed(known, 12, 80)}"
        )
    for path, site in chosen:
        if site.name in modules:
            raise _invalid(f"names {path}, whose module target_modules names as well")
        if isinstance(site, LinearSite) and site.transposed:
            raise _invalid(f"names {path}, which is stored transposed: name its module in target_modules instead")
    holders = [path.rpartition(".")[0] for path, _ in chosen]
    return [
        ParameterTarget(path, site, holders[index + 1 :].count(holders[index]))
        for index, (path, site) in enumerate(chosen)
    ]


def _parameters(base: BaseModel) -> Iterator[tuple[str, ExpertsSite | LinearSite]]:
    for site in base.sites.values():
        if isinstance(site, ExpertsSite):
            yield site.name, site
        elif isinstance(site, LinearSite):
            yield f"{site.name}.weight", site


def _invalid(problem: str) -> InvalidConfigError:
    return InvalidConfigError(f"target_parameters {problem}", metadata={"field": "target_parameters"})
