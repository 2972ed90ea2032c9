"""Compression of adapters with deltas of whole weights: to one bit per weight, or by truncated SVD."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltamux.adapter_files import CONFIG_FILE
from deltamux.deltas import Checkpoint, Dense
from deltamux.deltas.ops.sign_dense import pack_signs, unpack_signs
from deltamux.errors import InvalidAdapterError, InvalidArgumentError
from deltamux.registry import Registry
from deltamux_trainers.loading import describe_base
from deltamux_trainers.output_dir import atomic_output, check_output, output_exists

FORMS = ("bitdelta", "svd")
REPORT_FILE = "compress_report.json"


@dataclass(frozen=True)
class CompressResult:
    """The result of a compression, also written to ``compress_report.json`` with the error of every matrix.

    Attributes:
        matrices: number of the compressed ones; the rest of the adapter is kept as it is.
        error: ||D - D'|| / ||D|| over all of them (Frobenius), D the delta before, D' after.
        worst_error: the largest error of one matrix; worst: its name.
    """

    output: Path
    form: str
    matrices: int
    error: float
    worst_error: float
    worst: str
    bytes_before: int
    bytes_after: int


@torch.no_grad()
def compress(model: str, adapter: Path, output: Path, *, form: str = "bitdelta", rank: int = 16) -> CompressResult:
    """Writes a smaller adapter of the same method.

    Args:
        form: ``bitdelta`` (Liu et al. 2024, arXiv:2402.10193: sign(D) times mean |D|, which is the best scale for the
            signs; the paper's distillation of the scales is not done) or ``svd`` (the best delta of `rank`: Eckart &
            Young 1936).
    Raises:
        InvalidAdapterError: the adapter's files hold no delta of a whole weight.
        FailedPreconditionError: the output holds an adapter already, or other files.
    """
    if form not in FORMS or rank < 1:
        raise InvalidArgumentError(f"form is one of {', '.join(FORMS)} and rank positive, not {form!r} and {rank}")
    if (output / CONFIG_FILE).exists():
        raise output_exists(f"{output} holds an adapter already: choose another output")
    check_output(output, (adapter,))
    method, _, program, checkpoint = Registry().load(adapter, describe_base(model))
    names = [f"{site}.weight" for site, op in program if isinstance(op, Dense)]
    if not names or not set(names) <= set(checkpoint.tensors):
        raise InvalidAdapterError(
            f"an adapter of method {method.name!r} is compressed only if its files hold plain changes of weights, as "
            "those of full and topk do; this one holds none"
        )
    tensors = dict(checkpoint.tensors)
    norms: dict[str, tuple[float, float]] = {}
    for name in names:
        delta = tensors.pop(name).float()
        parts, approximation = _signs(delta) if form == "bitdelta" else _svd(delta, rank)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        norms[name] = (float((delta - approximation).norm()), float(delta.norm()))
    with atomic_output(output) as staging:
        Checkpoint(checkpoint.config, tensors, checkpoint.metadata).write(staging)
        return _report(output, staging, form, norms, checkpoint.tensors, tensors)


def _signs(delta: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    signs, scale = pack_signs(delta), delta.abs().mean()
    approximation = scale * unpack_signs(signs, delta.shape[1], torch.float32)
    return {"signs": signs, "scale": scale.reshape(1)}, approximation


def _svd(delta: Tensor, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = root.unsqueeze(1) * v[:rank], u[:, :rank] * root
    return {"a": a, "b": b}, b @ a


def _report(
    output: Path,
    staging: Path,
    form: str,
    norms: dict[str, tuple[float, float]],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> CompressResult:
    errors = {name: difference / size if size else 0.0 for name, (difference, size) in norms.items()}
    worst = max(errors, key=lambda name: errors[name])
    size = sum(size**2 for _, size in norms.values()) ** 0.5
    result = CompressResult(
        output=output,
        form=form,
        matrices=len(norms),
        error=sum(difference**2 for difference, _ in norms.values()) ** 0.5 / size if size else 0.0,
        worst_error=errors[worst],
        worst=worst,
        bytes_before=_num_bytes(before),
        bytes_after=_num_bytes(after),
    )
    report = {**asdict(result), "output": str(output), "errors": errors}
    (staging / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    return result


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
