"""`Op`: one formula with parameters, in three forms.

An op is a frozen dataclass: its tensor fields are its parameters, its other fields its attributes (plain JSON values).

* train: `apply`, differentiable; the reference executor calls it after the module of the op's site.
* merge: `merge` returns the site's changed weights, or raises NotMergeableError with the reason.
* serve: `batch`, the class that has the parameters of all resident adapters at one site of the engine, and applies each
  to its own rows of a mixed batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from deltamux.deltas.sites import Site, SiteKind
from deltamux.errors import BaseMismatchError, InvalidAdapterError, NotMergeableError

if TYPE_CHECKING:
    from deltamux.deltas.ops.batch import OpBatch

Attribute = bool | int | float | str
ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class Op:
    """Base of all ops; see the module's docstring."""

    name: ClassVar[str]
    site_kind: ClassVar[SiteKind]
    batch: ClassVar[type[OpBatch]]
    changes_input: ClassVar[bool] = False
    changes_weight: ClassVar[bool] = False
    """Whether the op changes a projection's weight and nothing else, so that an engine may merge it while it runs.

    Never inherited: an op derived from another has another formula.
    """
    output_rows: ClassVar[frozenset[str] | None] = None
    """Of an op at a projection: the parameters with one row per output feature; all others do not depend on the order
    of the outputs. None where that is not known. Never inherited either."""
    packed: ClassVar[frozenset[str]] = frozenset()
    """Parameters that hold bits (uint8), which no cast may touch; all others are floats."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.changes_weight = cls.__dict__.get("changes_weight", False)
        cls.output_rows = cls.__dict__.get("output_rows")

    @property
    def reads_residual(self) -> bool:
        """Whether `x` is, at a block, the residual stream that the output is added to, not the sub-layer's input."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters by field name; absent optional ones are left out."""
        return {name: value for name, value in self._values() if isinstance(value, Tensor)}

    def attributes(self) -> dict[str, Attribute]:
        """Returns the fields that are not tensors, as JSON values."""
        return {name: v for name, v in self._values() if v is not None and not isinstance(v, Tensor)}

    def _values(self) -> list[tuple[str, Any]]:
        names = _field_names(type(self))  # type: ignore[arg-type]  # to mypy a class hashes like its instances
        return [(name, getattr(self, name)) for name in names]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Self:
        return cls(**tensors, **attributes)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Self:
        """Returns the op with its parameters cast and moved, detached and contiguous; itself where they are already."""
        tensors = self.tensors()
        cast = {
            field: (tensor.detach() if tensor.requires_grad else tensor)
            .to(device=device, dtype=None if field in self.packed else dtype)
            .contiguous()
            for field, tensor in tensors.items()
        }
        if all(tensor is cast[field] for field, tensor in tensors.items()):
            return self
        return self.of(cast, self.attributes())

    def products(self) -> dict[str, Tensor]:
        """Returns, by name, the parameters that the op multiplies ahead of time, each by one of its attributes.

        The product of finite factors may not be finite.
        """
        return {}

    def weighted(self, weight: float) -> Op:
        """Returns the op with its change times `weight`.

        Raises:
            InvalidAdapterError: the op does not add a function of the site's input, so that a weight has no meaning for
            it.
        """
        raise InvalidAdapterError(
            f"{self.name} is not a change that is added, so it cannot be part of a weighted sum; stack it instead",
            metadata={"op": self.name},
        )

    def reordered(self, order: Tensor) -> Self:
        """Returns the op for a projection whose output i is the site's output ``order[i]``; needs `output_rows`."""
        assert self.output_rows is not None
        tensors = {name: t[order] if name in self.output_rows else t for name, t in self.tensors().items()}
        return self.of(tensors, self.attributes())

    def num_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def rank(self) -> int:
        """Returns the width of the op's widest inner dimension (LowRank's r, Bottleneck's width), 0 if it has none."""
        return 0

    def virtual_tokens(self) -> int:
        """Returns how many virtual tokens the op puts before the prompt."""
        return 0

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Returns the shape that each parameter must have at `site`."""
        raise NotImplementedError

    def check(self, site: Site) -> None:
        """Raises BaseMismatchError when a parameter does not fit the site."""
        if site.kind is not self.site_kind:
            raise InvalidAdapterError(
                f"op {self.name} is for {self.site_kind} sites; {site.name} is a {site.kind} site"
            )
        expected = self.expected_shapes(site)
        for field, tensor in self.tensors().items():
            if tuple(tensor.shape) != expected[field]:
                raise BaseMismatchError(
                    f"{self.name}.{field} at {site.name} has shape {list(tensor.shape)}, but this base model needs "
                    f"{list(expected[field])}: the adapter was made for another base",
                    metadata={"site": site.name, "parameter": field},
                )
            if tensor.is_floating_point() == (field in self.packed):
                raise InvalidAdapterError(
                    f"{self.name}.{field} at {site.name} has dtype {tensor.dtype}, but holds "
                    f"{'packed bits (uint8)' if field in self.packed else 'floats'}",
                    metadata={"site": site.name, "parameter": field},
                )

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        """Returns the site's new output, given its input `x` and output `y` ([..., features], any float dtype).

        Differentiable in x, y and the parameters; never changes `y` in place. Parameters take part in y's dtype.
        """
        raise NotImplementedError

    def apply_input(self, x: Tensor, site: Site) -> Tensor:
        """Returns what the site's module reads instead of `x`; called only where `changes_input` is true."""
        return x

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        """Returns the changed base parameters by name, in float32.

        Args:
            read: returns the present value of a base parameter; KeyError where the base has none.
        Raises:
            NotMergeableError: with the reason.
        """
        raise NotMergeableError(f"{self.name} at {site.name} cannot be merged into weights")


@cache
def _field_names(kind: type[Op]) -> tuple[str, ...]:
    """Cached, as it is called several times for each of an adapter's hundreds of ops."""
    return tuple(field.name for field in fields(kind))
