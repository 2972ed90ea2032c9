"""Attention layers with delta ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deltamux.deltas.ops import KVPrefix
from deltamux.engine.vllm.layers.current_step import CurrentStep, of_step
from deltamux.engine.vllm.layers.module_ops import ModuleOps


class AttentionWithDeltas:
    """An attention layer: keys and values of virtual tokens change right before they enter the cache.

    The attention is a custom op of vLLM already, so what changes is the backend's methods inside it, and the traced
    graph has nothing more to run; they change for steps that have virtual tokens (`intercept`).
    """

    def __init__(self, module: nn.Module, current: CurrentStep, ops: ModuleOps) -> None:
        self._current = current
        self._ops = ops
        self._module: Any = module
        backend: Any = module.impl
        self._backend = backend
        self._forward: Callable[..., Any] = backend.forward
        # Backends that write the cache in a step of its own read these keys and values there.
        self._update: Callable[..., Any] | None = getattr(backend, "do_kv_cache_update", None)

    def intercept(self, wanted: bool) -> None:
        """Puts this in place of the backend's methods for the steps to come, or takes it away."""
        self._backend.forward = self.forward if wanted else self._forward
        if self._update is not None:
            self._backend.do_kv_cache_update = self.update if wanted else self._update

    def forward(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._change(key, value)
        return self._forward(layer, query, key, value, *args, **kwargs)

    def update(self, layer: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._change(key, value)
        assert self._update is not None
        return self._update(layer, key, value, *args, **kwargs)

    @property
    def can_write(self) -> bool:
        """Whether `write` works: the backend writes caches by a method of its own, and this layer has a cache."""
        return self._update is not None and self._module.kv_sharing_target_layer_name is None

    def write(self, prefix: KVPrefix, slot_mapping: Tensor) -> None:
        """Writes keys and values into the layer's cache at `slot_mapping` [n] int64, outside a step's forward."""
        assert self._update is not None
        layer = self._module
        self._update(layer, prefix.key, prefix.value, layer.kv_cache, slot_mapping)

    def _change(self, key: Tensor | None, value: Tensor | None) -> None:
        step = self._current.index
        if step.virtual is None or not step.virtual.mask & self._ops.mask or key is None or value is None:
            return
        self._ops.apply(of_step(key, step).flatten(1), of_step(value, step).flatten(1), step)
