"""A program is what one adapter does to the base: ops at sites. Its compiled file is all the engine reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltamux.deltas.base_model import BaseModel
from deltamux.deltas.ops import OPS, Op
from deltamux.deltas.sites import Site
from deltamux.errors import InvalidAdapterError

FORMAT = "deltamux.program/1"


class Placement(NamedTuple):
    """One op at one site; the op's kind of site and the name identify it."""

    site: str
    op: Op


class PlacedOp(NamedTuple):
    """A placement whose site was looked up in a base."""

    site: Site
    op: Op


@dataclass(frozen=True, eq=False)
class Program:
    """Ops at sites. Methods that combine others are programs with more rows, nothing else.

    Ops at one site apply in the order they stand here.

    Attributes:
        num_virtual_tokens: how many virtual tokens stand in front of the prompt (0 without KVPrefix or SoftPrompt).
    """

    placements: tuple[Placement, ...]
    num_virtual_tokens: int = 0

    @classmethod
    def of(cls, placements: Iterable[tuple[str, Op]]) -> Program:
        """Builds a program; the number of virtual tokens is that of its prefixes.

        Raises:
            InvalidAdapterError: prefixes of different lengths, or no op at all.
        """
        rows = tuple(Placement(site, op) for site, op in placements)
        if not rows:
            raise InvalidAdapterError("the adapter changes nothing: it places no op at any site of the base model")
        lengths = {op.virtual_tokens() for _, op in rows} - {0}
        if len(lengths) > 1:
            raise InvalidAdapterError(
                f"prefixes of one adapter must be equally long in every layer; got {sorted(lengths)}"
            )
        fronts = sorted({op.name for _, op in rows if op.virtual_tokens()})
        if len(fronts) > 1:
            raise InvalidAdapterError(
                f"an adapter puts one thing in front of the prompt, not both {' and '.join(fronts)}"
            )
        return cls(rows, lengths.pop() if lengths else 0)

    def __iter__(self) -> Iterator[Placement]:
        return iter(self.placements)

    def placed(self, base: BaseModel) -> list[PlacedOp]:
        """Looks every site up and checks every op against it.

        Raises:
            BaseMismatchError: a site is missing or a shape does not fit: the adapter was made for another base.
        """
        rows = [PlacedOp(base.site(op.site_kind, site), op) for site, op in self.placements]
        for site, op in rows:
            op.check(site)
        return rows

    def check_finite(self) -> None:
        """Raises InvalidAdapterError naming the first parameter that holds a NaN or an infinity."""
        for site, op in self.placements:
            for field, tensor in op.tensors().items():
                if not torch.isfinite(tensor).all():
                    raise InvalidAdapterError(
                        f"{op.name}.{field} at {site} holds a value that is not finite in {tensor.dtype}",
                        reason="NOT_FINITE",
                        metadata={"site": site, "parameter": field},
                    )

    def rank(self) -> int:
        """Returns the widest inner dimension of any op."""
        return max(op.rank() for _, op in self.placements)

    def num_bytes(self) -> int:
        return sum(op.num_bytes() for _, op in self.placements)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Program:
        return Program(tuple(Placement(s, op.to(dtype, device)) for s, op in self.placements), self.num_virtual_tokens)

    def save(self, path: Path) -> None:
        """Writes the compiled file: tensors ``<row>.<parameter>`` and the rows as JSON in the header."""
        tensors = {
            f"{row}.{field}": tensor.detach().cpu().contiguous().clone()
            for row, (_, op) in enumerate(self.placements)
            for field, tensor in op.tensors().items()
        }
        rows = [{"site": site, "op": op.name, "attributes": op.attributes()} for site, op in self.placements]
        metadata = {"format": FORMAT, "num_virtual_tokens": str(self.num_virtual_tokens), "rows": json.dumps(rows)}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Program:
        """Reads a compiled file.

        Raises:
            InvalidAdapterError: the file is missing, damaged, of another format, or names an unknown op.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise InvalidAdapterError(f"{path} is no compiled program of format {FORMAT}")
                parameters: dict[int, dict[str, torch.Tensor]] = {}
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    row, _, field = name.partition(".")
                    parameters.setdefault(int(row), {})[field] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InvalidAdapterError(f"compiled program {path} cannot be read: {error}") from error
        rows: list[dict[str, Any]] = json.loads(metadata["rows"])
        placements = (
            Placement(row["site"], _op_class(row["op"]).of(parameters[i], row["attributes"]))
            for i, row in enumerate(rows)
        )
        return cls(tuple(placements), int(metadata["num_virtual_tokens"]))


def _op_class(name: str) -> type[Op]:
    try:
        return OPS[name]
    except KeyError:
        raise InvalidAdapterError(f"unknown op {name!r}; known: {', '.join(sorted(OPS))}") from None
