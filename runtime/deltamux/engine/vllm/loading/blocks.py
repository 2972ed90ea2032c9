"""Programs in one block of memory, of the engine's dtype, and on a device."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deltamux.deltas import Op, Program
from deltamux.deltas.program import Placement

ALIGNMENT = 64
"""Bytes at whose multiples a tensor of the block begins: a cache line."""


def in_one_block(program: Program, dtype: torch.dtype, *, pinned: bool = False) -> Program:
    """Returns the program in one block of memory of its own, floats cast to `dtype`.

    Nothing of it is left in a mapped file, whose pages a step might have to wait for. A parameter that the cast makes
    infinite, or a product of parameters, is named by InvalidAdapterError.

    Args:
        pinned: whether the memory is locked, so that an accelerator can copy it by itself.
    """
    step = max(1, ALIGNMENT // dtype.itemsize)
    placed = [(site, op, op.tensors()) for site, op in program]
    floats = [t for _, op, tensors in placed for field, t in tensors.items() if field not in op.packed]
    sizes = [(t.numel(), -t.numel() % step) for t in floats]
    block = torch.zeros(sum(map(sum, sizes)), dtype=dtype, pin_memory=pinned)
    parts = torch.split(block, [size for pair in sizes for size in pair])[::2]
    if parts:
        torch._foreach_copy_(parts, [t.reshape(-1) for t in floats])
    cast = iter([part.view(t.shape) for part, t in zip(parts, floats, strict=True)])

    def move(op: Op, tensors: Mapping[str, Tensor]) -> Op:
        moved = {f: _copied(t, pinned) if f in op.packed else next(cast) for f, t in tensors.items()}
        return op.of(moved, op.attributes())

    moved = Program(tuple(Placement(site, move(op, own)) for site, op, own in placed), program.num_virtual_tokens)
    _check_finite(moved, block)
    return moved


def on_device(program: Program, device: torch.device) -> Program:
    """Returns a program of one block on a device: one copy per block, however many tensors lie in it.

    Copies from pinned memory are queued on the current stream, and nothing waits for them.
    """
    blocks: dict[tuple[int, torch.dtype], Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.dtype)
        if key not in blocks:
            whole = tensor.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            blocks[key] = whole.to(device, non_blocking=True)
        return blocks[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def move(op: Op) -> Op:
        return op.of({field: moved(tensor) for field, tensor in op.tensors().items()}, op.attributes())

    return Program(tuple(Placement(site, move(op)) for site, op in program), program.num_virtual_tokens)


def _copied(tensor: Tensor, pinned: bool) -> Tensor:
    return torch.empty_like(tensor, pin_memory=pinned).copy_(tensor)


def _check_finite(program: Program, block: Tensor) -> None:
    """Checks all values in one pass; only a program that may fail is searched for the tensor."""
    attributes = {abs(v) for _, op in program for v in op.attributes().values() if isinstance(v, float)}
    largest = max(map(abs, torch.stack(torch.aminmax(block)).tolist())) if block.numel() else 0.0
    # An op multiplies a parameter by an attribute, if anything: no product is larger than this. False also for NaN.
    if not all(factor * largest <= torch.finfo(block.dtype).max for factor in {1.0, *attributes}):
        program.check_finite()
