"""Merging of an adapter into its base: the result is a plain Hugging Face model.

The base's files are copied as they are, with the weights that the adapter changes replaced, file by file. The reported
errors compare the written model with base and adapter, computed in float32.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltamux.deltas import BaseModel, Checkpoint, DenseEmbedding, Program, attached, merge_program
from deltamux.deltas.base_model import auto_model, read_base_config
from deltamux.deltas.merge import rounded
from deltamux.deltas.program import Placement
from deltamux.deltas.weights import WeightFiles
from deltamux.errors import BaseMismatchError, InvalidArgumentError, NotMergeableError
from deltamux.options import DTYPES
from deltamux.registry import LoadedAdapter, Registry
from deltamux_trainers.loading import describe_base, load_model
from deltamux_trainers.output_dir import atomic_output, check_output
from deltamux_trainers.tools.model_files import ModelFiles

PROBE_ROWS, PROBE_LENGTH = 2, 16
"""Shape of the random tokens whose logits are compared."""


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge.

    Attributes:
        dtype: of the written weights; auto is that of each in the base.
        parameters: number of the base's parameters that changed.
        error: ||written - exact|| / ||exact|| over all changed weights; exact are the base's weights with the adapter's
            ops merged, in float32. It includes the rounding to the written dtype, and the difference of weights that
            the method merges into others than the base's (QLoRA: the dequantised ones).
        worst_error: the largest error of one weight; worst: its name.
        logit_error: the largest difference of the logits of the written model and of the base with the adapter, in
            float32, over random tokens; None without verification.
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
    """Writes base and adapter as one model, whole or not at all.

    Args:
        method_name: merge by this method instead of that of the files; ``qlora`` merges a LoRA into the dequantised
            weights that it was trained over.
        dtype: of the written weights; auto keeps that of each.
        verify: whether to compare logits, which loads base and result, one after the other, in float32.
    Raises:
        NotMergeableError: the adapter cannot be merged into weights; the message says why.
        BaseMismatchError: the adapter was trained on another base.
        FailedPreconditionError: the output holds files, and `overwrite` is not set; or the base is quantised, or not
            whole.
    """
    if dtype not in ("auto", *DTYPES):
        raise InvalidArgumentError(f"dtype is auto, {', '.join(DTYPES)}, not {dtype!r}", metadata={"field": "dtype"})
    files = ModelFiles.locate(model)
    check_output(output, (files.directory, adapter), overwrite=overwrite)
    files.check_plain()
    base = describe_base(model)
    stored = base.files or files.weights  # a base's files also read what several tensors make up
    base_in_float = replace(base, _read=lambda name: stored.read(name).float())
    loaded = _load(adapter, method_name, base_in_float)
    weights = _MergedWeights(loaded, base_in_float, stored)
    _check_embedding(files.directory, base, loaded.program)
    written_dtype = None if dtype == "auto" else getattr(torch, dtype)
    with atomic_output(output) as staging:
        files.copy_others(staging)
        files.write_weights(staging, weights.merge_file, weights.rounded, written_dtype)
        logit_error = _logit_error(str(files.directory), base, loaded.program, staging) if verify else None
    return _result(output, loaded.method.name, dtype, weights.errors, logit_error)


class _Error(NamedTuple):
    """||written - exact|| and ||exact||, of one weight or of all."""

    difference: float
    size: float

    @property
    def relative(self) -> float:
        return self.difference / self.size if self.size else 0.0


def _result(
    output: Path, method: str, dtype: str, errors: Mapping[str, _Error], logit_error: float | None
) -> MergeResult:
    worst = max(errors, key=lambda name: errors[name].relative)
    total = _Error(*(math.hypot(*column) for column in zip(*errors.values(), strict=True)))
    return MergeResult(
        output=output,
        method=method,
        dtype=dtype,
        parameters=len(errors),
        error=total.relative,
        worst_error=errors[worst].relative,
        worst=worst,
        logit_error=logit_error,
    )


class _MergedWeights:
    """The base's weights with an adapter merged, file by file, in float32.

    Attributes:
        errors: of the weights rounded so far, by stored name.
    """

    def __init__(self, adapter: LoadedAdapter, base: BaseModel, weights: WeightFiles) -> None:
        self._base = base
        self._weights = weights
        method, config, program, checkpoint = adapter
        self._by_method = method.own_merge(config, base, checkpoint.tensors)
        self._placements: dict[Path, list[Placement]] = {}
        for placement in program:
            for file in self._files_of(placement):
                self._placements.setdefault(file, []).append(placement)
        self._exact: dict[str, Tensor] = {}
        self.errors: dict[str, _Error] = {}

    def merge_file(self, file: Path) -> dict[str, Tensor]:
        """Returns the changed tensors of a file by stored name, in float32."""
        placements = self._placements.get(file, [])
        try:
            exact = merge_program(Program.of(placements), self._base) if placements else {}
        except NotMergeableError:
            if self._by_method is None:
                raise
            exact = self._by_method  # a method's own merge may exist where its ops have none
        merged = exact if self._by_method is None else self._by_method
        self._exact = self._in_file(file, exact)
        return self._in_file(file, merged)

    def rounded(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns a changed tensor in the written dtype, and records its error."""
        written = rounded(name, tensor, dtype)
        exact = self._exact.get(name)
        exact = (self._weights.read(name) if exact is None else exact).double()
        self.errors[name] = _Error(float((written.double() - exact).norm()), float(exact.norm()))
        return written

    def _files_of(self, placement: Placement) -> set[Path]:
        """Returns the files with a weight of an op's site; for a tied head, also those of the embedding."""
        head = self._base.head
        tied = {head.name, head.tied_to} if head is not None and head.tied_to is not None else set()
        sites = tied if placement.site in tied else {placement.site}
        names = {f"{site}.{field}" for site in sites for field in ("weight", "bias")} | {placement.site}
        found = {file for name in names for file in self._files_with(name)}
        if not found and self._by_method is None:
            merge_program(Program.of([placement]), self._base)  # raises for ops without a weight, as a bottleneck
            site = placement.site
            raise BaseMismatchError(f"the base's files hold no weight of {site}", metadata={"site": site})
        return found

    def _in_file(self, file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of parameters that a file holds, by stored name."""
        found = {}
        for name, tensor in tensors.items():
            for own in self._names_of(name):
                if file not in self._files_with(own):
                    continue
                for stored, part in self._weights.as_stored(own, tensor).items():
                    if self._weights.place(stored)[0] == file:
                        found[stored] = part if own == name else part.clone()
        return found

    def _names_of(self, name: str) -> tuple[str, ...]:
        """Returns the names of a parameter: a tied head's weight may also be stored under its own name."""
        head = self._base.head
        if head is None or head.tied_to is None or name != f"{head.tied_to}.weight":
            return (name,)
        return (name, f"{head.name}.weight")

    def _files_with(self, name: str) -> set[Path]:
        """Returns the files that hold a parameter, or parts of one that is stored as several tensors."""
        try:
            return {file for file, _ in self._weights.places(name)}
        except KeyError:
            return set()


def _check_embedding(model: Path, base: BaseModel, program: Program) -> None:
    """Raises NotMergeableError where the adapter changes an embedding that scales its rows (Gemma's)."""
    if not any(isinstance(op, DenseEmbedding) for _, op in program):
        return
    with torch.device("meta"):
        config = read_base_config(model)
        built: Any = auto_model(config).from_config(config)
    if type(built.get_submodule(base.embedding.name)).forward is not nn.Embedding.forward:
        raise NotMergeableError(
            f"{base.architecture} scales the output of {base.embedding.name}, which the adapter changes: that is not "
            "a change of its weight alone; serve it as an adapter instead",
            metadata={"site": base.embedding.name},
        )


def _load(directory: Path, method_name: str | None, base: BaseModel) -> LoadedAdapter:
    registry = Registry()
    method, checkpoint = registry.recognise(Checkpoint.read(directory))
    if method_name is not None:
        wanted = registry.get(method_name)
        if method.name not in (wanted.name, wanted.info.files_of):
            raise InvalidArgumentError(
                f"the files are of method {method.name!r}, which {wanted.name!r} does not read",
                metadata={"method": method.name},
            )
        method = wanted
    return method.load(checkpoint, base)


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
