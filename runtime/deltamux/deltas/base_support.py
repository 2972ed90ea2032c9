"""`BaseSupport`: which ops an engine's loaded model takes at which sites; uploads are checked against it alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deltamux.deltas.base_model import BaseModel
from deltamux.deltas.ops import DenseEmbedding, Op, SoftPrompt
from deltamux.deltas.program import Program
from deltamux.deltas.sites import SiteKind
from deltamux.errors import BaseMismatchError

IN_SCALE = (DenseEmbedding, SoftPrompt)
"""Ops at the input embedding whose parameters are of the embeddings' own scale, and so can be put in another."""


@dataclass(frozen=True)
class BaseSupport:
    """What an engine's base takes, as it was found at the engine's start.

    Attributes:
        sites: kind and name of every site that takes ops.
        refused: the other sites of the base, with the reason.
        reordered: projections whose outputs the engine holds in another order than the checkpoint.
        packed: projections that the engine computes together with others, from one input.
        without_norm: blocks before which no norm of the engine's reads the residual stream.
        scaled_embedding: whether the engine scales the input embeddings.
        dtype: of the weights; dtype_reason: why that one.
    """

    sites: frozenset[tuple[str, str]]
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)
    reordered: frozenset[str] = frozenset()
    packed: frozenset[str] = frozenset()
    without_norm: frozenset[str] = frozenset()
    scaled_embedding: bool = False
    dtype: str = ""
    dtype_reason: str = ""

    def refusal(self, site: str, op: Op) -> str | None:
        """Returns why an op cannot run at a site; None where it can."""
        if (reason := self.refused.get((op.site_kind, site))) is not None:
            return reason
        if (op.site_kind, site) not in self.sites:
            return f"the engine's model has no {op.site_kind} site {site}"
        if op.reads_residual and site in self.without_norm:
            return f"vLLM's model has no norm before {site} that reads the residual stream"
        if op.site_kind is SiteKind.EMBEDDING and self.scaled_embedding and not isinstance(op, IN_SCALE):
            return f"vLLM scales what {site} returns, and {op.name} is not known to follow it"
        if op.site_kind is SiteKind.LINEAR and site in self.reordered and op.output_rows is None:
            return f"vLLM holds the outputs of {site} in another order, and {op.name} is not known to follow it"
        if op.changes_input and site in self.packed:
            return f"{site} is packed with other projections here, so that its input alone cannot be changed"
        return None

    def check(self, program: Program) -> None:
        """Raises BaseMismatchError with the first reason for which the program cannot run."""
        for site, op in program:
            if (reason := self.refusal(site, op)) is not None:
                raise BaseMismatchError(reason, metadata={"site": site, "kind": str(op.site_kind)})

    def lines(self) -> list[str]:
        """Returns a few lines for people: dtype, number of sites by kind, and one site per reason of a refusal."""
        kinds = Counter(kind for kind, _ in self.sites)
        counted = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        lines = [f"weights in {self.dtype}: {self.dtype_reason}", f"takes deltas at {counted or 'no'} sites"]
        kinds_refused = Counter(kind for kind, _ in self.refused)
        for kind, number in sorted(kinds_refused.items()):
            first = next(reason for (of, _), reason in self.refused.items() if of == kind)
            lines.append(f"takes none at {number} {kind} site{'s' if number > 1 else ''}: {first}")
        return lines

    def representative(self, base: BaseModel) -> BaseModel:
        """Returns the base with one layer of each kind alone: what fits there fits in all layers."""
        layers: dict[int | None, list[object]] = defaultdict(list)
        for (kind, name), site in base.sites.items():
            layer: int | None = getattr(site, "layer", None)
            traits = (name in self.reordered, name in self.packed, name in self.without_norm)
            layers[layer].append((kind, name.replace(f".{layer}.", ".*."), (str(kind), name) in self.refused, *traits))
        of_kind = {str(traits): layer for layer, traits in reversed(layers.items())}
        kept = {key: site for key, site in base.sites.items() if getattr(site, "layer", None) in of_kind.values()}
        return replace(base, sites=kept)

    def plain(self) -> dict[str, Any]:
        """Returns it as lists, strings and numbers, as processes exchange them."""
        values = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in vars(self).items()}
        return values | {"refused": [(kind, name, reason) for (kind, name), reason in self.refused.items()]}

    @classmethod
    def of_workers(cls, answers: Sequence[Mapping[str, Any]], *, dtype: str, dtype_reason: str) -> BaseSupport:
        """Returns what every worker takes, from their `plain` forms."""

        def named(key: str) -> frozenset[str]:
            return frozenset(name for answer in answers for name in answer[key])

        refused = {(kind, name): reason for answer in answers for kind, name, reason in answer["refused"]}
        return cls(
            frozenset((kind, name) for answer in answers for kind, name in answer["sites"]) - refused.keys(),
            refused,
            reordered=named("reordered"),
            packed=named("packed"),
            without_norm=named("without_norm"),
            scaled_embedding=any(answer["scaled_embedding"] for answer in answers),
            dtype=dtype,
            dtype_reason=dtype_reason,
        )
