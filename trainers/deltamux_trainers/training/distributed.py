"""The processes of a distributed training run, which torchrun starts; the main one writes and prints."""

import os

import torch
import torch.distributed as dist


def is_main_process() -> bool:
    """Returns whether this is the process of rank 0; true without torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Returns once every process has called it; raises after torch's time limit (half an hour)."""
    if world_size() > 1:
        dist.barrier()


def mean(value: float, device: torch.device) -> float:
    """Returns the mean of a value over all processes, which all call this."""
    return _all_reduce(value, device, dist.ReduceOp.SUM) / world_size() if world_size() > 1 else value


def any_process(flag: bool, device: torch.device) -> bool:
    """Returns whether the flag of any process is set; all call this."""
    return bool(_all_reduce(float(flag), device, dist.ReduceOp.MAX)) if world_size() > 1 else flag


def _all_reduce(value: float, device: torch.device, op: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=op)
    return float(tensor)
