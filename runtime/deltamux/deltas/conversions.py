"""Parameters that transformers makes of several stored tensors, as it stacks the experts of a mixture when it loads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltamux.errors import FailedPreconditionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Conversion:
    """One parameter, the stored tensors that it is made of, and how.

    Attributes:
        name: the parameter's path in the model.
        stored: names of the tensors, in the order in which transformers takes them.
        patterns: for each of them, the pattern of the converter that it matches.
        converter: transformers' ``WeightConverter``.
        model: the model, whose weights are not read.
    """

    name: str
    stored: tuple[str, ...]
    patterns: tuple[str, ...]
    converter: Any
    model: PreTrainedModel

    def convert(self, read: Read) -> Tensor:
        """Returns the parameter."""
        return self._converted(zip(self.stored, self.patterns, strict=True), read)

    def experts(self, chosen: Sequence[int], read: Read) -> Tensor:
        """Returns the parts of some experts [len(chosen), ...], of a parameter that is a stack of all of them."""
        by_pattern: dict[str, list[str]] = {}
        for stored, pattern in zip(self.stored, self.patterns, strict=True):
            by_pattern.setdefault(pattern, []).append(stored)
        if any(len(names) <= max(chosen) for names in by_pattern.values()):
            return self.convert(read)[list(chosen)]  # what is stored is not a tensor for each expert
        parts = [(names[expert], pattern) for pattern, names in by_pattern.items() for expert in chosen]
        return self._converted(parts, read)

    def reverse(self, tensor: Tensor) -> dict[str, Tensor]:
        """Returns a value of the parameter as stored tensors by name.

        Raises:
            FailedPreconditionError: transformers would store them by other names than the base's files have.
        """
        from transformers.core_model_loading import revert_weight_conversion

        parts: dict[str, Tensor] = revert_weight_conversion(self.model, {self.name: tensor})
        if set(parts) != set(self.stored):
            raise FailedPreconditionError(
                f"{self.name} is made of {len(self.stored)} tensors such as {self.stored[0]!r} in the base's files, "
                "and transformers writes others: save the base again with save_pretrained",
                reason="BASE_DAMAGED",
                metadata={"tensor": self.name},
            )
        return {name: part.contiguous() for name, part in parts.items()}

    def _converted(self, parts: Iterable[tuple[str, str]], read: Read) -> Tensor:
        converter = copy.deepcopy(self.converter)
        for stored, pattern in parts:
            converter.add_tensor(self.name, stored, pattern, read(stored))
        with torch.no_grad():
            made = converter.convert(self.name, model=self.model, config=self.model.config)[self.name]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor


def conversions_of(model: PreTrainedModel, stored: Iterable[str]) -> tuple[dict[str, str], Mapping[str, Conversion]]:
    """Returns what transformers makes of a checkpoint's tensors when it loads them into `model`.

    Returns:
        the stored name of each parameter that is one stored tensor, and the conversions of all others, by name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    renamed: dict[str, str] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    parameters = model.state_dict()
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if pattern is None:
            renamed[target] = name
        else:
            parts.setdefault(target, []).append((name, pattern))
    made: dict[str, Conversion] = {}
    for target, found in parts.items():
        names, patterns = zip(*found, strict=True)
        made[target] = Conversion(target, names, patterns, by_pattern[patterns[0]], model)
    return renamed, made
