"""The processes of one training run: torchrun starts several, of which the first writes and prints."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def is_first() -> bool:
    """Tells whether this process is the one that writes files and prints; true where there is but one."""
    return int(os.environ.get("RANK", "0")) == 0


def count() -> int:
    """Returns how many processes take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait_for_all() -> None:
    """Returns once every process has come here; after torch's time limit (half an hour) it raises."""
    if count() > 1:
        dist.barrier()


def mean(value: float, device: torch.device) -> float:
    """Returns the mean of a figure over all processes, which all call this."""
    return _reduced(value, device, dist.ReduceOp.SUM) / count() if count() > 1 else value


def any_of(flag: bool, device: torch.device) -> bool:
    """Tells whether any process has the flag set; all call this."""
    return bool(_reduced(float(flag), device, dist.ReduceOp.MAX)) if count() > 1 else flag


def _reduced(value: float, device: torch.device, how: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=how)
    return float(tensor)
