"""What a decoder makes of token ids before its first layer, against what it makes of their embeddings.

PEFT puts a soft prompt before the embeddings of the prompt, and gives both to the model in place of ids. Some models
(Falcon-H1, Gemma 3n) treat ids otherwise: they scale the embeddings that they look up themselves, or look up more.
Engines run on ids, so that a soft prompt would meet another base there than in PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS = 3


class _LayerReachedError(Exception):
    """The first layer is about to run: nothing behind it matters."""


class _Formulas(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Writes down, for tensors that are computed from `source`, how; no values are needed."""

    def __init__(self, source: Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.source = source
        self._known: dict[int, tuple[Tensor, str]] = {}

    def of(self, value: Any) -> str:
        """Returns how a value came from the source; of tensors that did not, the shape alone."""
        if isinstance(value, tuple | list):
            return f"({', '.join(map(self.of, value))})"
        if not isinstance(value, Tensor):
            return f"{value}" if isinstance(value, int | float | str | None) else type(value).__name__
        if value is self.source:
            return "embeddings"
        return self._known[id(value)][1] if id(value) in self._known else f"{tuple(value.shape)}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # of masks without padding, which models look into
        output = func(*args, **(kwargs or {}))
        parts = [self.of(value) for value in (*args, *(kwargs or {}).values())]
        if any("embeddings" in part for part in parts):
            formula = parts[0] if _keeps(func, args) else f"{func}({', '.join(parts)})"
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, Tensor):
                    self._known[id(tensor)] = (tensor, formula)  # kept, so that no other gets its id
        return output


def _keeps(func: Any, args: Any) -> bool:
    """Returns whether an op returns its first argument's values: products with one, and copies."""
    name = func.overloadpacket.__name__.rstrip("_")
    is_one = len(args) > 1 and not isinstance(args[1], Tensor) and args[1] == 1
    return (name in ("mul", "div") and is_one) or name in ("detach", "alias", "view", "clone")


def takes_embeddings(model: nn.Module, embedding: nn.Module, first_layer: nn.Module) -> bool:
    """Returns whether the model makes the same of embeddings as of the ids that they are looked up by.

    Args:
        model: a Hugging Face causal model; on the meta device, too. One that cannot be run on ids up to its first
            layer takes them, as far as anyone can tell.
    """
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=next(embedding.parameters()).device)
    with torch.no_grad(), torch.random.fork_rng():
        try:
            of_ids = _formula(model, embedding, first_layer, {"input_ids": ids})
        except Exception:  # whatever a model does with so few arguments
            return True
        try:
            return of_ids == _formula(model, embedding, first_layer, {"inputs_embeds": embedding(ids)})
        except Exception:  # Gemma 4 looks for the ids of embeddings
            return False


def _formula(model: nn.Module, embedding: nn.Module, first_layer: nn.Module, inputs: dict[str, Tensor]) -> str:
    """Returns how what the first layer reads was computed from embeddings."""
    formulas = _Formulas(inputs.get("inputs_embeds"))
    read: list[str] = []

    def embedded(module: nn.Module, args: Any, output: Tensor) -> None:
        formulas.source = output

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        read.append(", ".join(formulas.of(value) for value in (*args, *dict(sorted(kwargs.items())).values())))
        raise _LayerReachedError

    handles = [
        embedding.register_forward_hook(embedded),
        first_layer.register_forward_pre_hook(stop, with_kwargs=True),
    ]
    try:
        with formulas:
            model(**inputs, use_cache=False)
    except _LayerReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return read[0]
