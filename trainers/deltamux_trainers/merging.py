"""Merges an adapter into its base: a plain Hugging Face model that needs deltamux no more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.deltas import BaseModel, Checkpoint
from deltamux.errors import BaseMismatchError, FailedPreconditionError
from deltamux.registry import Registry


@torch.no_grad()
def merge(model: str, adapter: Path, output: Path, *, overwrite: bool = False) -> Path:
    """Writes base and adapter as one model, in the base's dtype; the output is whole or not there.

    Raises:
        NotMergeableError: the method cannot be folded into weights; the message says why.
        BaseMismatchError: the adapter was made for another base.
        FailedPreconditionError: the output exists and holds files, and `overwrite` is not set.
    """
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise FailedPreconditionError(
            f"{output} is not empty: choose another output, or allow it to be overwritten", reason="OUTPUT_EXISTS"
        )
    base = BaseModel.from_pretrained(model)
    method, checkpoint = Registry().recognise(Checkpoint.read(adapter))
    declared = checkpoint.metadata.get("base_fingerprint")
    if declared and declared != base.fingerprint:
        raise BaseMismatchError(
            f"the adapter was trained on a base with fingerprint {declared}, but {model} has {base.fingerprint}",
            metadata={"declared": declared, "base": base.fingerprint},
        )
    changed = method.merge(method.parse(checkpoint.config), base, checkpoint.tensors)
    merged: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    for name, tensor in changed.items():
        merged.get_parameter(name).copy_(tensor)
    staging = output.with_name(f".{output.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    merged.save_pretrained(staging)
    AutoTokenizer.from_pretrained(model).save_pretrained(staging)
    shutil.rmtree(output, ignore_errors=True)
    staging.rename(output)
    return output
