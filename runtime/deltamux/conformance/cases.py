"""A case: one method on one small base, and adapters of it."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamux.conformance.bases import ARCHITECTURES, save_base
from deltamux.deltas import BaseModel, Checkpoint, Program, attached
from deltamux.errors import InvalidConfigError
from deltamux.registry import Method, Registry

PROMPT = (5, 17, 99, 200, 3, 42)


class Refused(AssertionError):
    """A check failed; the message has which and how."""


@dataclass(frozen=True)
class Case:
    """One method on one small base.

    Attributes:
        options: of the method, as in a YAML file; the defaults where empty.
        directory: of the base model.
    """

    registry: Registry
    method: Method
    architecture: str
    directory: Path
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.method.name}-{self.architecture}"

    @cached_property
    def base(self) -> BaseModel:
        return described(self.directory)

    @cached_property
    def config(self) -> Any:
        return self.method.parse(self.options)

    def applies(self) -> bool:
        """Returns whether the method finds something to change in this base, and can be trained."""
        if not self.method.info.trains:
            return False
        try:
            return bool(self.method.parameters(self.config, self.base))
        except InvalidConfigError:
            return False

    def fresh(self) -> dict[str, Tensor]:
        """Returns the trainable parameters as they start."""
        parameters: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for name, spec in self.method.parameters(self.config, self.base).items():
                parameters[name] = torch.empty(spec.shape)
                spec.init(parameters[name])
        return parameters

    def trained(self, seed: int = 1) -> dict[str, Tensor]:
        """Returns trainable parameters moved away from their start, as training would."""
        generator = torch.Generator().manual_seed(seed)
        return {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in self.fresh().items()}

    def checkpoint(self, seed: int = 1) -> Checkpoint:
        """Returns a trained adapter, as its files hold it."""
        with torch.no_grad():
            tensors = self.method.export(self.config, self.base, self.trained(seed))
        schedule = self.method.schedule(self.config, self.base, 10)
        config, tensors = schedule.finish(self.config, tensors)
        return self.method.checkpoint(config, self.base, tensors)

    def program(self, checkpoint: Checkpoint) -> Program:
        """Reads an adapter the way an upload does."""
        return self.method.load(checkpoint, self.base).program

    def prepared_model(self) -> tuple[Any, bool]:
        """Returns the base as the method trains over it, and whether the method changed it (quantised it, say)."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.directory)
        prepared = self.method.prepare(self.config, self.base, model)
        return model.eval().requires_grad_(False), prepared

    def logits(self, program: Program | Any | None = None, model: Any | None = None) -> Tensor:
        """Returns the base's logits for PROMPT, with a program (or what builds one) attached where given."""
        model, ids = model or loaded(self.directory), torch.tensor([PROMPT])
        if program is None:
            plain: Tensor = model(ids).logits
            return plain
        with attached(model, self.base, program):
            changed: Tensor = model(ids).logits
        return changed


def cases(
    *names: str,
    registry: Registry | None = None,
    architectures: Sequence[str] = ARCHITECTURES,
    options: Mapping[str, Any] | None = None,
) -> list[Case]:
    """Returns a case for each method and each architecture that it applies to.

    Raises:
        Refused: a method applies to none of them with these options.
    """
    registry = registry or Registry()
    found: list[Case] = []
    for name in names or registry.names():
        method = registry.get(name)
        own = [Case(registry, method, name, base_directory(name), options or {}) for name in architectures]
        applicable = [case for case in own if case.applies()]
        if not applicable and method.info.trains:
            raise Refused(f"method {name!r} finds nothing to train in any of {', '.join(architectures)}")
        found += applicable
    return found


@cache
def base_directory(architecture: str) -> Path:
    """Returns the directory of a small random base, made once per process."""
    root = Path(_scratch().name)
    return save_base(root / architecture, architecture)


@cache
def described(directory: Path) -> BaseModel:
    return BaseModel.from_pretrained(directory)


@cache
def loaded(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    return model.eval().requires_grad_(False)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="deltamux-conformance-")
