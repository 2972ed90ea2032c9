"""Merges an adapter into its base: a plain Hugging Face model that needs deltamux no more."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.deltas import BaseModel, Checkpoint, Program, merge_program
from deltamux.errors import BaseMismatchError, FailedPreconditionError, InvalidArgumentError, NotMergeableError
from deltamux.registry import Method, Registry
from deltamux_trainers.loading import describe_base


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        parameters: how many of the base's parameters changed.
        error: how far the merged weights are, relatively, from the base's own with the adapter's ops folded in: zero
            but for methods that merge into something else than the base's weights (QLoRA: the dequantised ones).
    """

    output: Path
    method: str
    parameters: int
    error: float


@torch.no_grad()
def merge(
    model: str, adapter: Path, output: Path, *, method_name: str | None = None, overwrite: bool = False
) -> MergeResult:
    """Writes base and adapter as one model, in the base's dtype; the output is whole or not there.

    Args:
        method_name: merge by this method instead of the one that the files say; ``qlora`` merges a LoRA into the
            dequantised weights that it was trained over.
    Raises:
        NotMergeableError: the method cannot be folded into weights; the message says why.
        BaseMismatchError: the adapter was made for another base.
        FailedPreconditionError: the output exists and holds files, and `overwrite` is not set.
    """
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise FailedPreconditionError(
            f"{output} is not empty: choose another output, or allow it to be overwritten", reason="OUTPUT_EXISTS"
        )
    base = describe_base(model)
    registry = Registry()
    method, checkpoint = registry.recognise(Checkpoint.read(adapter))
    if method_name is not None:
        method = _reader_of(registry.get(method_name), method)
    declared = checkpoint.metadata.get("base_fingerprint")
    if declared and declared != base.fingerprint:
        raise BaseMismatchError(
            f"the adapter was trained on a base with fingerprint {declared}, but {model} has {base.fingerprint}",
            metadata={"declared": declared, "base": base.fingerprint},
        )
    config = method.parse(checkpoint.config)
    changed = method.merge(config, base, checkpoint.tensors)
    merged: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    for name, tensor in changed.items():
        merged.get_parameter(name).copy_(tensor)
    staging = output.with_name(f".{output.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    merged.save_pretrained(staging)
    AutoTokenizer.from_pretrained(model).save_pretrained(staging)
    shutil.rmtree(output, ignore_errors=True)
    staging.rename(output)
    error = _distance(changed, method.program(config, base, checkpoint.tensors), base)
    return MergeResult(output, method.name, len(changed), error)


def _reader_of(wanted: Method, found: Method) -> Method:
    if found.name not in (wanted.name, wanted.info.files_of):
        raise InvalidArgumentError(
            f"the files are of method {found.name!r}, which {wanted.name!r} does not read",
            metadata={"method": found.name},
        )
    return wanted


def _distance(merged: dict[str, Tensor], program: Program, base: BaseModel) -> float:
    """Returns ||merged - exact|| / ||exact|| over all merged weights, exact being the base's with the ops folded in."""
    try:
        exact = merge_program(program, base)
    except NotMergeableError:
        return 0.0
    difference = size = 0.0
    for name, tensor in merged.items():
        expected = exact[name] if name in exact else base.tensor(name)
        difference += float((tensor.double() - expected.double()).square().sum())
        size += float(expected.double().square().sum())
    return (difference / size) ** 0.5 if size else 0.0
