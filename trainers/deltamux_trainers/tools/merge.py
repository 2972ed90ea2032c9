"""Merges an adapter into its base: a plain Hugging Face model that needs deltamux no more.

The base's files are copied as they are; of its weights, file by file, those that the adapter changes are replaced. What
is told of the error compares what was written with the base and the adapter, computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltamux.deltas import BaseModel, Checkpoint, DenseEmbedding, Program, attached, merge_program
from deltamux.deltas.merge import rounded
from deltamux.deltas.program import Placement
from deltamux.deltas.weights import WeightFiles
from deltamux.errors import BaseMismatchError, InvalidArgumentError, NotMergeableError
from deltamux.options import DTYPES
from deltamux.registry import LoadedAdapter, Method, Registry
from deltamux_trainers.loading import describe_base, load_model
from deltamux_trainers.output_dir import atomic_output, check_output
from deltamux_trainers.tools.model_files import ModelFiles

PROBE_ROWS, PROBE_LENGTH = 2, 16
"""Random tokens that the logits of the merged model are compared on."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        dtype: of the written weights; auto is that of each in the base.
        parameters: how many of the base's parameters changed.
        error: how far the changed weights are, as written, from the base's own with the adapter's ops folded in, in
            float32: ||written - exact|| / ||exact|| over all of them. It holds the rounding to the written dtype, and
            what the method merges into something else than the base's weights (QLoRA: the dequantised ones).
        worst_error: of the weight that is furthest off; worst: its name.
        logit_error: the largest difference between the logits of the written model and those of the base with the
            adapter attached, both computed in float32, over random tokens; None where it was not asked for.
    """

    output: Path
    method: str
    dtype: str
    parameters: int
    error: float
    worst_error: float
    worst: str
    logit_error: float | None


@torch.no_grad()
def merge(
    model: str,
    adapter: Path,
    output: Path,
    *,
    method_name: str | None = None,
    overwrite: bool = False,
    dtype: str = "auto",
    verify: bool = True,
) -> MergeResult:
    """Writes base and adapter as one model; the output is whole or not there.

    Args:
        method_name: merge by this method instead of the one that the files say; ``qlora`` merges a LoRA into the
            dequantised weights that it was trained over.
        dtype: of the written weights; auto keeps that of each.
        verify: whether to compare logits, which loads base and result, one after the other, in float32.
    Raises:
        NotMergeableError: the method cannot be folded into weights; the message says why.
        BaseMismatchError: the adapter was made for another base.
        FailedPreconditionError: the output exists and holds files, and `overwrite` is not set; or the base is
            quantised, or not whole.
    """
    if dtype not in ("auto", *DTYPES):
        raise InvalidArgumentError(f"dtype is auto, {', '.join(DTYPES)}, not {dtype!r}", metadata={"field": "dtype"})
    files = ModelFiles.locate(model)
    check_output(output, (files.directory, adapter), overwrite=overwrite)
    files.check_plain()
    base = describe_base(model)
    exact = replace(base, _read=lambda name: files.weights.read(name).float())
    merging = _Merging(_load(adapter, method_name, exact), exact, files.weights)
    _check_embedding(files.directory, base, merging.program)
    with atomic_output(output) as staging:
        files.copy_others(staging)
        files.write_weights(staging, merging.changes, merging.kept, None if dtype == "auto" else getattr(torch, dtype))
        logit_error = _logit_error(str(files.directory), base, merging.program, staging) if verify else None
    losses = merging.losses
    worst = max(losses, key=lambda name: losses[name].relative)
    whole = _Loss(*(math.hypot(*column) for column in zip(*losses.values(), strict=True)))
    return MergeResult(
        output=output,
        method=merging.method,
        dtype=dtype,
        parameters=len(losses),
        error=whole.relative,
        worst_error=losses[worst].relative,
        worst=worst,
        logit_error=logit_error,
    )


class _Loss(NamedTuple):
    """||written - exact|| and ||exact||, of a weight or of all."""

    difference: float
    size: float

    @property
    def relative(self) -> float:
        return self.difference / self.size if self.size else 0.0


class _Merging:
    """Computes what an adapter changes, file by file, in float32, and what is lost when it is written.

    Attributes:
        method: name of the adapter's.
        program: of the adapter.
        losses: by stored name of a written weight.
    """

    def __init__(self, adapter: LoadedAdapter, base: BaseModel, weights: WeightFiles) -> None:
        self._base = base
        self._weights = weights
        method, config, self.program, checkpoint = adapter
        self.method = method.name
        self._own = method.own_merge(config, base, checkpoint.tensors)
        self._rows: dict[Path, list[Placement]] = {}
        for row in self.program:
            for file in self._files_of(row):
                self._rows.setdefault(file, []).append(row)
        self._exact: dict[str, Tensor] = {}
        self.losses: dict[str, _Loss] = {}

    def changes(self, file: Path) -> dict[str, Tensor]:
        """Returns the changed tensors of a file by stored name, in float32."""
        rows = self._rows.get(file, [])
        try:
            exact = merge_program(Program.of(rows), self._base) if rows else {}
        except NotMergeableError:
            if self._own is None:
                raise
            exact = self._own  # a method may merge what its ops cannot
        merged = exact if self._own is None else self._own
        self._exact = self._stored(file, exact)
        return self._stored(file, merged)

    def kept(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns a changed tensor as it is written, and notes what that loses."""
        written = rounded(name, tensor, dtype)
        exact = self._exact.get(name)
        exact = (self._weights.read(name) if exact is None else exact).double()
        self.losses[name] = _Loss(float((written.double() - exact).norm()), float(exact.norm()))
        return written

    def _files_of(self, row: Placement) -> set[Path]:
        """Returns the files that hold a weight of an op's site; of a tied head, also those of the embedding."""
        head = self._base.head
        tied = {head.name, head.tied_to} if head is not None and head.tied_to is not None else set()
        sites = tied if row.site in tied else {row.site}
        names = {f"{site}.{field}" for site in sites for field in ("weight", "bias")}
        found = {place[0] for place in map(self._place, names) if place is not None}
        if not found and self._own is None:
            # Virtual tokens and bottlenecks have no weight, and say so; what should have one is not in the files.
            merge_program(Program.of([row]), self._base)
            raise BaseMismatchError(f"the base's files hold no weight of {row.site}", metadata={"site": row.site})
        return found

    def _stored(self, file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns those of some parameters that a file holds, by the names that they have there."""
        found = {}
        for name, tensor in tensors.items():
            for own in self._names_of(name):
                place = self._place(own)
                if place is not None and place[0] == file:
                    found[place[1]] = tensor if own == name else tensor.clone()
        return found

    def _names_of(self, name: str) -> tuple[str, ...]:
        """Returns a parameter's names: a tied head's weight may be stored once more, under its own."""
        head = self._base.head
        if head is None or head.tied_to is None or name != f"{head.tied_to}.weight":
            return (name,)
        return (name, f"{head.name}.weight")

    def _place(self, name: str) -> tuple[Path, str] | None:
        try:
            return self._weights.place(name)
        except KeyError:
            return None


def _check_embedding(model: Path, base: BaseModel, program: Program) -> None:
    """Raises NotMergeableError where the adapter changes an embedding whose output is not its rows (Gemma's)."""
    if not any(isinstance(op, DenseEmbedding) for _, op in program):
        return
    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    if type(built.get_submodule(base.embedding.name)).forward is not nn.Embedding.forward:
        raise NotMergeableError(
            f"{base.architecture} scales the output of {base.embedding.name}, which the adapter changes: that is no "
            "change of its weight alone; serve it as an adapter instead",
            metadata={"site": base.embedding.name},
        )


def _load(directory: Path, method_name: str | None, base: BaseModel) -> LoadedAdapter:
    registry = Registry()
    method, checkpoint = registry.recognise(Checkpoint.read(directory))
    if method_name is not None:
        method = _reader_of(registry.get(method_name), method)
    return method.load(checkpoint, base)


def _reader_of(wanted: Method, found: Method) -> Method:
    if found.name not in (wanted.name, wanted.info.files_of):
        raise InvalidArgumentError(
            f"the files are of method {found.name!r}, which {wanted.name!r} does not read",
            metadata={"method": found.name},
        )
    return wanted


def _logit_error(model: str, base: BaseModel, program: Program, merged: Path) -> float:
    """Returns the largest difference of the logits of two models, loaded one after the other, in float32."""
    expected = _logits(model, base, program)
    return float((_logits(str(merged), base, None) - expected).abs().max())


def _logits(model: str, base: BaseModel, program: Program | None) -> Tensor:
    loaded: Any = load_model(model, "float32", "cpu").eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.embedding.vocab_size, (PROBE_ROWS, PROBE_LENGTH), generator=generator)
    with attached(loaded, base, program) if program else nullcontext():
        logits: Tensor = loaded(ids).logits
    return logits
