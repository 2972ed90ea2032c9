"""The trainable model: a frozen base, a method's parameters, and the program that they make, anew in every forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamux.deltas import Attachment, BaseModel, Program
from deltamux.hookspecs import ParameterSpec, TrainingSchedule
from deltamux.registry import Method
from deltamux_trainers.data.files import IGNORED
from deltamux_trainers.training.in_place import own_weights


class DeltaModel(nn.Module):
    """A base with one method attached; only the method's parameters train.

    Where they are changes of weights, and the method says so, the weights themselves are trained (see `in_place`).

    Attributes:
        schedule: what the method does beside gradient steps; see `begin`.

    Args:
        base_model: a Hugging Face causal model; frozen here.
        base: its description.
        seed: of the fresh parameters.
    """

    def __init__(self, base_model: nn.Module, base: BaseModel, method: Method, config: Any, seed: int = 0) -> None:
        super().__init__()
        self.base_model = base_model.requires_grad_(False)
        # A base that was changed for training is read from its files: its own tensors are no weights any more.
        prepared = method.prepare(config, base, base_model)
        self._files, self._base = base, base if prepared else base.reading(base_model)
        self._method = method
        self._method_config = config
        self.schedule = TrainingSchedule()
        specs = method.parameters(config, self._base)
        # Those of the base are registered by it: here they are only looked up.
        dtype = next(base_model.parameters()).dtype
        self._own = {} if prepared else own_weights(method, config, base, base_model, specs)
        self._autocast = bool(self._own) and dtype is torch.bfloat16
        self.deltas = nn.ParameterList([] if self._own else _fresh(specs, seed, next(base_model.parameters()).device))
        self._names = list(specs)
        if not self._own:
            Attachment(base_model, self._base, self.program)

    def begin(self, num_steps: int) -> None:
        """Asks the method what happens beside gradient steps in a run of `num_steps` updates."""
        self.schedule = self._method.schedule(self._method_config, self._base, num_steps)

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Returns what is trained, by the names that the method declares: its own tensors, or the base's weights."""
        if self._own:
            return {name: own.parameter for name, own in self._own.items()}
        return dict(zip(self._names, self.deltas, strict=True))

    def exported(self) -> Mapping[str, Tensor]:
        """Returns the checkpoint's tensors for the present parameters."""
        changes = {name: own.change(self._files) for name, own in self._own.items()} or self.parameters_by_name()
        return self._method.export(self._method_config, self._base, changes)

    def program(self) -> Program:
        return self._method.program(self._method_config, self._base, self.exported())

    def load_parameters(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters_by_name().items():
                parameter.copy_(values[name])

    def share(self) -> float:
        """Returns trainable parameters divided by the base's."""
        trainable: int = sum(p.numel() for p in self.parameters_by_name().values())
        return trainable / self._base.num_parameters

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Returns the mean loss over the learnt tokens, and logits [rows, length, vocabulary].

        Args:
            num_items_in_batch: learnt tokens in all micro-batches of the optimizer step, so that gradient accumulation
                equals the larger batch.
        """
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self._autocast):
            logits = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        loss = token_loss(logits, labels, num_items_in_batch)
        penalty = self.schedule.penalty(self.parameters_by_name()) if self.training else None
        if penalty is not None:
            # Of an accumulated batch, each part brings its share.
            share = 1.0 if num_items_in_batch is None else (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
            loss = loss + penalty * share
        return {"loss": loss, "logits": logits}


def _fresh(specs: Mapping[str, ParameterSpec], seed: int, device: torch.device) -> list[nn.Parameter]:
    """Returns the declared parameters as they start, float32."""
    found: list[nn.Parameter] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for spec in specs.values():
            fresh = torch.empty(spec.shape, dtype=torch.float32)
            spec.init(fresh)
            found.append(nn.Parameter(fresh.to(device)))
    return found


def token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Returns the cross-entropy of each next token, summed and divided by `num_items` (None: the learnt ones)."""
    targets = labels[:, 1:].reshape(-1)
    predictions = logits[:, :-1].reshape(targets.shape[0], -1).float()
    total = F.cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum")
    return total / (num_items if num_items is not None else (targets != IGNORED).sum().clamp(min=1))
