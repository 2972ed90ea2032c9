"""The output head with delta ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deltamux.deltas.sites import HeadSite
from deltamux.engine.vllm.layers.current_step import CurrentStep
from deltamux.engine.vllm.layers.module_ops import ModuleOps


class HeadWithDeltas:
    """The output head: its products, before they are scaled or capped, of the last row of every request, uncompiled.

    Args:
        processor: the model's ``LogitsProcessor``.
    """

    def __init__(self, processor: Any, current: CurrentStep, ops: ModuleOps) -> None:
        self._processor = processor
        self._get_logits: Callable[..., Any] = self._processor._get_logits
        self._current = current
        self._ops = ops
        self._processor._get_logits = self.get_logits

    def get_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = self._get_logits(hidden, *args, **kwargs)
        step = self._current.index.last_rows
        if step is not None and step.mask & self._ops.mask and logits is not None:
            if step.num_rows != hidden.shape[0]:
                raise RuntimeError(f"{hidden.shape[0]} rows of logits in a step of {step.num_rows} requests")
            site = self._ops.slices[0].site
            assert isinstance(site, HeadSite)
            self._ops.apply(hidden, logits[:, : site.vocab_size], step)
        return logits

    def projected(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Returns the head's products [rows, vocab_size] of `hidden`, as they are before anything else."""
        kept: list[Tensor] = []

        def keep(*args: Any, **kwargs: Any) -> Any:
            kept.append(self._get_logits(*args, **kwargs))
            return kept[-1].clone()

        self._processor._get_logits = keep
        try:
            model.compute_logits(hidden)  # type: ignore[operator]  # vLLM's method
        finally:
            self._processor._get_logits = self.get_logits
        return kept[0]
