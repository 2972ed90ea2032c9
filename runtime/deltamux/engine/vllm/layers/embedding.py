"""The input embedding with delta ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deltamux.engine.vllm.layers import custom_ops
from deltamux.engine.vllm.layers.base import LayerWithDeltas, as_rows


class EmbeddingWithDeltas(LayerWithDeltas):
    """The input embedding: tables change, and virtual tokens get embeddings of their own."""

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(ids, *args, **kwargs)
        custom_ops.change_output(ids.flatten(), as_rows(output), self._handle)
        return output
