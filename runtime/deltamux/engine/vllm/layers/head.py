"""The output head with delta ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deltamux.deltas.sites import HeadSite
from deltamux.engine.vllm.layers.current_step import CurrentStep
from deltamux.engine.vllm.layers.module_ops import ModuleOps


class HeadWithDeltas:
    """The output head: the model's logits, which vLLM computes for the last row of every request alone, uncompiled."""

    def __init__(self, model: nn.Module, current: CurrentStep, ops: ModuleOps) -> None:
        self._compute_logits: Callable[..., Any] = model.compute_logits  # type: ignore[assignment]  # vLLM's method
        self._current = current
        self._ops = ops
        model.compute_logits = self.compute_logits  # type: ignore[assignment]  # on the instance

    def compute_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = self._compute_logits(hidden, *args, **kwargs)
        step = self._current.index.last_rows
        if step is not None and step.mask & self._ops.mask and logits is not None:
            if step.num_rows != hidden.shape[0]:
                raise RuntimeError(f"{hidden.shape[0]} rows of logits in a step of {step.num_rows} requests")
            site = self._ops.slices[0].site
            assert isinstance(site, HeadSite)
            self._ops.apply(hidden, logits[:, : site.vocab_size], step)
        return logits
