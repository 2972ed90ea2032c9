"""The trainable model: a frozen base and the parameters of one method."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamux.deltas import Attachment, BaseModel, Program
from deltamux.hookspecs import ParameterSpec, TrainingSchedule
from deltamux.registry import Method
from deltamux_trainers.data.tokenization import IGNORE_INDEX
from deltamux_trainers.training.base_weights import trainable_base_weights


class DeltaModel(nn.Module):
    """A base with one method attached, as PEFT's PeftModel: only the method's parameters are trained.

    Each forward pass applies the program of the present parameters. Where the parameters are deltas of the base's
    weights, and the method names these, the weights are trained in place (see `base_weights`).

    Attributes:
        schedule: the method's actions between gradient steps; see `start_schedule`.

    Args:
        base_model: a Hugging Face causal model; frozen here.
        base: its description.
        seed: of the parameters' initialisation.
    """

    def __init__(self, base_model: nn.Module, base: BaseModel, method: Method, config: Any, seed: int = 0) -> None:
        super().__init__()
        self.base_model = base_model.requires_grad_(False)
        # The weights of a prepared base are read from its files: its own tensors are not weights any more (QLoRA).
        prepared = method.prepare(config, base, base_model)
        self._files, self._base = base, base if prepared else base.reading(base_model)
        self._method = method
        self._method_config = config
        self.schedule = TrainingSchedule()
        specs = method.parameters(config, self._base)
        dtype = next(base_model.parameters()).dtype
        self._base_weights = {}
        if not prepared:
            self._base_weights = trainable_base_weights(method, config, base, base_model, specs)
        self._autocast = bool(self._base_weights) and dtype is torch.bfloat16
        device = next(base_model.parameters()).device
        self.deltas = nn.ParameterList([] if self._base_weights else _initial_parameters(specs, seed, device))
        self._names = list(specs)
        if not self._base_weights:
            Attachment(base_model, self._base, self.program)

    def start_schedule(self, num_steps: int) -> None:
        """Sets the method's schedule for a run of `num_steps` updates."""
        self.schedule = self._method.schedule(self._method_config, self._base, num_steps)

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Returns the trained tensors, by the names that the method declares: its parameters, or the base's weights."""
        if self._base_weights:
            return {name: each.parameter for name, each in self._base_weights.items()}
        return dict(zip(self._names, self.deltas, strict=True))

    def export(self) -> Mapping[str, Tensor]:
        """Returns the adapter's tensors for the present parameters."""
        deltas = {name: each.delta(self._files) for name, each in self._base_weights.items()}
        return self._method.export(self._method_config, self._base, deltas or self.parameters_by_name())

    def program(self) -> Program:
        return self._method.program(self._method_config, self._base, self.export())

    def load_parameters(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters_by_name().items():
                parameter.copy_(values[name])

    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.parameters_by_name().values())

    def trainable_share(self) -> float:
        """Returns the trainable parameters divided by the base's."""
        return self.num_trainable() / self._base.num_parameters

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
            num_items_in_batch: learnt tokens in all micro-batches of the optimizer step, by which the loss is divided:
                with gradient accumulation it then equals that of the larger batch.
        """
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self._autocast):
            logits = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        loss = causal_lm_loss(logits, labels, num_items_in_batch)
        penalty = self.schedule.penalty(self.parameters_by_name()) if self.training else None
        if penalty is not None:
            # Each micro-batch adds its share of the penalty.
            share = 1.0 if num_items_in_batch is None else (labels[:, 1:] != IGNORE_INDEX).sum() / num_items_in_batch
            loss = loss + penalty * share
        return {"loss": loss, "logits": logits}


def _initial_parameters(specs: Mapping[str, ParameterSpec], seed: int, device: torch.device) -> list[nn.Parameter]:
    """Returns the declared parameters, initialised, in float32."""
    parameters: list[nn.Parameter] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for spec in specs.values():
            tensor = torch.empty(spec.shape, dtype=torch.float32)
            spec.init(tensor)
            parameters.append(nn.Parameter(tensor.to(device)))
    return parameters


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Returns the cross-entropy of the learnt tokens, summed and divided by `num_items` (None: their number)."""
    targets = labels[:, 1:].reshape(-1)
    predictions = logits[:, :-1].reshape(targets.shape[0], -1).float()
    total = F.cross_entropy(predictions, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (num_items if num_items is not None else (targets != IGNORE_INDEX).sum().clamp(min=1))
