"""`Program`: the ops of one adapter, each with its site. Its compiled file is all that the engine reads."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltamux.deltas.base_model import BaseModel
from deltamux.deltas.ops import Op, op_class
from deltamux.deltas.reading import ChecksumError, read_tensors
from deltamux.deltas.sites import Site
from deltamux.errors import DataLossError, InvalidAdapterError

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
    """Ops at sites. Ops at one site apply in the program's order.

    Attributes:
        num_virtual_tokens: how many virtual tokens come before the prompt (0 without KVPrefix or SoftPrompt).
    """

    placements: tuple[Placement, ...]
    num_virtual_tokens: int = 0

    @classmethod
    def of(cls, placements: Iterable[tuple[str, Op]]) -> Program:
        """Builds a program; the number of virtual tokens is that of its prefixes.

        Raises:
            InvalidAdapterError: prefixes of different lengths, or no op at all.
        """
        # Ops with virtual tokens come last: their values replace what other ops make of the virtual tokens' rows.
        made = sorted(map(Placement._make, placements), key=lambda placement: placement.op.virtual_tokens() > 0)
        if not made:
            raise InvalidAdapterError("the adapter changes nothing: it places no op at any site of the base model")
        lengths = {op.virtual_tokens() for _, op in made} - {0}
        if len(lengths) > 1:
            raise InvalidAdapterError(
                f"prefixes of one adapter must be equally long in every layer; got {sorted(lengths)}"
            )
        sites = [site for site, op in made if op.virtual_tokens()]
        if len(set(sites)) < len(sites):
            raise InvalidAdapterError(
                "an adapter has one kind of virtual tokens; here two ops with virtual tokens are at one site"
            )
        names = sorted({op.name for _, op in made if op.virtual_tokens()})
        if len(names) > 1:
            raise InvalidAdapterError(f"an adapter has one kind of virtual tokens, not both {' and '.join(names)}")
        return cls(tuple(made), lengths.pop() if lengths else 0)

    def __iter__(self) -> Iterator[Placement]:
        return iter(self.placements)

    def placed(self, base: BaseModel) -> list[PlacedOp]:
        """Looks every site up and checks every op against it.

        Raises:
            BaseMismatchError: a site is missing or a shape does not fit: the adapter was made for another base.
        """
        placed = [PlacedOp(base.site(op.site_kind, site), op) for site, op in self.placements]
        for site, op in placed:
            op.check(site)
        return placed

    def check_finite(self) -> None:
        """Raises InvalidAdapterError naming the first parameter, attribute or product that is not finite."""
        for site, op in self.placements:
            for field, tensor in (op.tensors() | op.products()).items():
                if not torch.isfinite(tensor).all():
                    problem = f"{op.name}.{field} at {site} holds a value that is not finite in {tensor.dtype}"
                    raise _not_finite(problem, site, field)
            for field, value in op.attributes().items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise _not_finite(f"{op.name}.{field} at {site} is {value}", site, field)

    def rank(self) -> int:
        """Returns the widest inner dimension of any op."""
        return max(op.rank() for _, op in self.placements)

    def num_bytes(self) -> int:
        return sum(op.num_bytes() for _, op in self.placements)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Program:
        return Program(tuple(Placement(s, op.to(dtype, device)) for s, op in self.placements), self.num_virtual_tokens)

    def save(self, path: Path, *, base_fingerprint: str = "") -> None:
        """Writes the compiled file: tensors ``<index>.<parameter>``, placements as JSON (``rows``) in the header.

        Args:
            base_fingerprint: of the base that the program is for; "" where it is not known.
        """
        tensors = {
            f"{index}.{field}": tensor.detach().cpu().contiguous().clone()
            for index, (_, op) in enumerate(self.placements)
            for field, tensor in op.tensors().items()
        }
        rows = [{"site": site, "op": op.name, "attributes": op.attributes()} for site, op in self.placements]
        metadata = {"format": FORMAT, "num_virtual_tokens": str(self.num_virtual_tokens), "rows": json.dumps(rows)}
        metadata |= {"base_fingerprint": base_fingerprint} if base_fingerprint else {}
        save_file(tensors, path, metadata=metadata)

    @staticmethod
    def outline(path: Path) -> list[tuple[str, str]]:
        """Returns (site, name of the op) of every placement of a compiled file, by its header alone.

        Raises:
            OSError, SafetensorError: the file is missing or damaged.
        """
        with safe_open(path, framework="pt") as file:
            rows: list[dict[str, Any]] = json.loads((file.metadata() or {}).get("rows", "[]"))
        return [(row["site"], row["op"]) for row in rows]

    @classmethod
    def load(cls, path: Path, sha256: str = "") -> Program:
        """Reads a compiled file into memory, whole; the tensors share it.

        Args:
            sha256: of the file as it was stored, in hex; "" where it was not stored.

        Raises:
            DataLossError: the file is missing, or is not what was stored.
            InvalidAdapterError: the file is damaged, of another format, or names an unknown op; or it is missing, and
                was not stored.
        """
        try:
            tensors, metadata = read_tensors(path, sha256)
            if metadata.get("format") != FORMAT:
                raise InvalidAdapterError(f"{path} is not a compiled program of format {FORMAT}")
            return cls(_placements(metadata, tensors), int(metadata["num_virtual_tokens"]))
        except ChecksumError as error:
            raise _damaged(f"its file is damaged: {error}", path) from error
        except (OSError, SafetensorError) as error:
            if sha256 and (problem := _loss(error)):
                raise _damaged(problem, path) from error
            raise InvalidAdapterError(f"compiled program {path} cannot be read: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidAdapterError(
                f"compiled program {path} is damaged: its tensors are not those of its rows "
                f"({type(error).__name__}: {error})"
            ) from error


def _placements(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> tuple[Placement, ...]:
    parameters: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, field = name.partition(".")
        parameters.setdefault(int(index), {})[field] = tensor
    rows: list[dict[str, Any]] = json.loads(metadata["rows"])
    if set(parameters) != set(range(len(rows))):
        raise ValueError(f"{len(rows)} rows, but tensors of {len(parameters)}")
    return tuple(
        Placement(row["site"], op_class(row["op"]).of(parameters[i], row["attributes"])) for i, row in enumerate(rows)
    )


def _loss(error: Exception) -> str:
    """Returns the damage of a stored file that an error means; "" where the file may be whole."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return "its file is missing"
    return "its file cannot be read from the disk" if getattr(error, "errno", None) == errno.EIO else ""


def _damaged(problem: str, path: Path) -> DataLossError:
    return DataLossError(problem, reason="PROGRAM_DAMAGED", metadata={"path": str(path)})


def _not_finite(problem: str, site: str, field: str) -> InvalidAdapterError:
    return InvalidAdapterError(problem, reason="NOT_FINITE", metadata={"site": site, "parameter": field})
