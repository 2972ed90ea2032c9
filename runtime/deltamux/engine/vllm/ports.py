"""Ports: where a module of the loaded vLLM model lets delta ops in.

A port replaces one module's ``forward`` (on the instance; the module keeps its class, weights and attributes). What it
adds is one opaque op, which torch.compile traces around: with no row of the step belonging to an adapter that has an op
here, it costs a call and one integer ``&``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from deltamux.deltas.kernels import doors
from deltamux.deltas.ops import KVPrefix, StepIndex
from deltamux.deltas.sites import HeadSite
from deltamux.engine.vllm import opaque
from deltamux.engine.vllm.lanes import Lanes

IDLE = StepIndex((), 0, 0)
"""A step in which every row is the base's."""


def of_step(x: Tensor, step: StepIndex) -> Tensor:
    """Returns the rows of `x` that are the step's: all but those that CUDA graphs pad it with."""
    return x if x.shape[0] == step.num_rows else x[: step.num_rows]


class FoldedStep(NamedTuple):
    """A step in which modules run with the weights of one program; see `folding.Folding`.

    Attributes:
        others: rows of everybody else, which need the base's weights; None when there are none.
        weights: the step without the program's rows: whose changes of weights are still to be applied.
    """

    others: slice | Tensor | None
    weights: StepIndex

    @classmethod
    def of(cls, step: StepIndex, slot: int) -> FoldedStep:
        weights = StepIndex((r for r in step.runs if r.slot != slot), step.num_rows, step.num_slots, device=step.device)
        others = (step.slots != slot).nonzero().squeeze(1)
        if not len(others):
            return cls(None, weights)
        first, last = int(others[0]), int(others[-1])
        consecutive = last - first == len(others) - 1
        return cls(slice(first, last + 1) if consecutive else others, weights)


class CurrentStep:
    """The step that is running; one object shared by all ports of a model.

    Attributes:
        index: who owns each of its rows.
        folded: what else there is to know where modules run with a program's weights; None where they do not.
        door: the same for the doors of the CPU kernels.
    """

    def __init__(self) -> None:
        self.door = doors.RunningStep()
        self.begin(IDLE)

    def begin(self, index: StepIndex, folded: FoldedStep | None = None) -> None:
        """Makes a step the one that is running."""
        self.index, self.folded = index, folded
        if index.device.type == "cpu":
            self.door.set(index.mask, index.segments, in_python=folded is not None)


class Port(opaque.Opaque):
    """Base of the ports: the module, its own forward, and the lanes behind it."""

    def __init__(self, module: nn.Module, current: CurrentStep, lanes: Lanes) -> None:
        self.module = module
        self.lanes = lanes
        self._forward: Callable[..., Any] = module.forward
        self._current = current
        self._ticket = opaque.register(self, current, lanes)
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def change_output(self, x: Tensor, y: Tensor) -> None:
        step = self._current.index
        if step.mask & self.lanes.mask:
            self.lanes.apply(of_step(x, step), of_step(y, step), step)


class BlockInput:
    """The input of a sub-layer in the step that is running, kept from where it is read to where it is needed.

    Attributes:
        x: what its first projections read.
        residual: the residual stream that its output is added to; None where no norm in front of it reads that.
    """

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.residual: Tensor | None = None


class SubLayer(NamedTuple):
    """The sub-layer whose output a projection writes: its ops, and what it has read."""

    lanes: Lanes
    read: BlockInput


class LinearPort(Port):
    """A projection, fused or not: its parts' own ops, and the ops of the sub-layer that reads or writes here.

    Attributes:
        reads: sub-layers whose input this module reads.
        writes: the sub-layer whose output it returns, see `end`.
        base: projects rows with the base's own weight; None unless the module has a folded one beside it.
    """

    def __init__(self, module: nn.Module, current: CurrentStep, lanes: Lanes) -> None:
        super().__init__(module, current, lanes)
        self.reads: list[BlockInput] = []
        self.writes: SubLayer | None = None
        self.base: Callable[[Tensor], Tensor] | None = None

    def end(self, sub_layer: SubLayer) -> None:
        """Makes this the projection that ends a sub-layer: nobody else reads its input, which may then change."""
        self.writes = sub_layer
        opaque.open_for(self._ticket, sub_layer.lanes)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        alone = len(self.lanes.parts) == 1
        if self.writes is not None and alone:
            opaque.change_input(x, self._ticket)
        output = self._forward(x, *args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        for block in self.reads:
            block.x = x
        if self.writes is None:
            opaque.change_output(x, y, self._ticket)
        else:
            read = self.writes.read
            opaque.change_sub_layer(x, x if read.x is None else read.x, read.residual, y, self._ticket)
            read.x = read.residual = None
        return output

    def change_input(self, x: Tensor) -> None:
        step = self._current.index
        if step.mask & self.lanes.input_mask:
            self.lanes.change_input(of_step(x, step), step)

    def change_output(self, x: Tensor, y: Tensor) -> None:
        step = self._current.index
        if step.mask & self.lanes.input_mask and self.writes is None:
            x = self._with_changed_input(x, y, step)
        folded = self._current.folded
        if folded is None or self.base is None:
            super().change_output(x, y)
            return
        # Every module with folded weights gets here: a step is folded only if it has rows of the folded program, whose
        # slot has ops in these lanes.
        if folded.others is not None:
            y[folded.others] = self.base(x[folded.others])
        if step.mask & self.lanes.mask:
            self.lanes.apply(of_step(x, step), of_step(y, step), step, weights=folded.weights)

    def change_sub_layer(self, x: Tensor, read: Tensor, residual: Tensor | None, y: Tensor) -> None:
        """The projection's own ops come first, then those of the sub-layer that it ends."""
        self.change_output(x, y)
        step, sub_layer = self._current.index, self.writes
        assert sub_layer is not None
        if step.mask & sub_layer.lanes.mask:
            stream = None if residual is None else of_step(residual, step)
            sub_layer.lanes.apply(of_step(read, step), of_step(y, step), step, stream)

    def _with_changed_input(self, x: Tensor, y: Tensor, step: StepIndex) -> Tensor:
        """Projects once more, since others may read this input too; returns the copy that has changed."""
        x = x.clone()
        self.lanes.change_input(of_step(x, step), step)
        output = self._forward(x)
        y.copy_(output[0] if isinstance(output, tuple) else output)
        return x


class NormPort(Port):
    """A norm, also one that adds the residual first: then the sum, its second output, is what it normalised.

    Attributes:
        feeds: the sub-layer that stands behind it, if any, whose residual stream is what it normalised.
    """

    def __init__(self, module: nn.Module, current: CurrentStep, lanes: Lanes) -> None:
        super().__init__(module, current, lanes)
        self.feeds: BlockInput | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(x, *args, **kwargs)
        y, normalised = output if isinstance(output, tuple) else (output, x)
        if self.feeds is not None:
            self.feeds.residual = normalised
        opaque.change_output(normalised, y, self._ticket)
        return output


class EmbeddingPort(Port):
    """The input embedding: tables change, and virtual tokens get embeddings of their own."""

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(ids, *args, **kwargs)
        opaque.change_output(ids, output, self._ticket)
        return output


class HeadPort:
    """The output head: the model's logits, which vLLM computes for the last row of every request alone, uncompiled."""

    def __init__(self, model: nn.Module, current: CurrentStep, lanes: Lanes) -> None:
        self._compute_logits: Callable[..., Any] = model.compute_logits  # type: ignore[assignment]  # vLLM's method
        self._current = current
        self._lanes = lanes
        model.compute_logits = self.compute_logits  # type: ignore[assignment]  # on the instance

    def compute_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = self._compute_logits(hidden, *args, **kwargs)
        step = self._current.index.last_rows
        if step is not None and step.mask & self._lanes.mask and logits is not None:
            if step.num_rows != hidden.shape[0]:
                raise RuntimeError(f"{hidden.shape[0]} rows of logits in a step of {step.num_rows} requests")
            site = self._lanes.parts[0].site
            assert isinstance(site, HeadSite)
            self._lanes.apply(hidden, logits[:, : site.vocab_size], step)
        return logits


class AttentionPort:
    """An attention layer: keys and values of virtual tokens change right before they enter the cache.

    vLLM's own op around the attention is opaque already, so the port stands inside it, at the backend's methods, and
    the traced graph has nothing more to run. It stands there in steps that have virtual tokens (`intercept`).
    """

    def __init__(self, module: nn.Module, current: CurrentStep, lanes: Lanes) -> None:
        self._current = current
        self._lanes = lanes
        self._module: Any = module
        backend: Any = module.impl
        self._backend = backend
        self._forward: Callable[..., Any] = backend.forward
        # Backends that write the cache in a step of its own read these keys and values there.
        self._update: Callable[..., Any] | None = getattr(backend, "do_kv_cache_update", None)

    def intercept(self, wanted: bool) -> None:
        """Has the steps to come pass by here, or not."""
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

    def write(self, prefix: KVPrefix, slots: Tensor) -> None:
        """Writes keys and values into the layer's cache at `slots` [n] int64, outside a step's forward."""
        assert self._update is not None
        layer = self._module
        self._update(layer, prefix.key, prefix.value, layer.kv_cache, slots)

    def _change(self, key: Tensor | None, value: Tensor | None) -> None:
        step = self._current.index
        if step.virtual is None or not step.virtual.mask & self._lanes.mask or key is None or value is None:
            return
        self._lanes.apply(of_step(key, step).flatten(1), of_step(value, step).flatten(1), step)
