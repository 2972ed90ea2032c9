"""The hooks of a fine-tuning method, which a plugin implements.

A plugin is a module (or object) with functions marked `hookimpl`, registered under the entry point group
``deltamux.methods``; one plugin is one method. A module may have its hooks in an object called ``METHOD`` instead. The
built-in methods are registered the same way.

One definition has three forms: `deltamux_program` turns named tensors into ops at sites, and is differentiable.
Training calls it with trainable parameters, serving and merging with a checkpoint's tensors; so what was trained is
what is served.

Hooks are called outside the engine, in the trainer and at upload, never while tokens are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltamux.deltas import BaseModel, Checkpoint, Program
    from deltamux.registry import Registry

PROJECT = "deltamux"
ENTRY_POINT_GROUP = "deltamux.methods"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

BOOKKEEPING = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
)
"""Keys of PEFT's adapter_config.json files that change nothing that is served; every method skips them."""

Initialiser = Callable[["Tensor"], Any]
"""Fills a float32 tensor in place (`torch.nn.init` style)."""


@dataclass(frozen=True)
class MethodInfo:
    """The description of a method.

    Attributes:
        name: the method's one name, as on the command line (``lora``).
        title: its name in prose (``LoRA``).
        summary: one line: what it places where.
        paper: link to the source.
        peft_type: the ``peft_type`` of its checkpoints' adapter_config.json; PEFT's own where PEFT has the method.
        config_class: a frozen dataclass; its fields are the keys of adapter_config.json and of ``--set``, and it checks
            its values in ``__post_init__`` (raise InvalidConfigError).
        ignored_keys: further keys, next to `BOOKKEEPING`, that do not change what is served, and are skipped.
        refused_keys: keys that change what is computed and are not served, each with the reason and a way out.
        file_defaults: values of keys that a file lacks, where they are not training's defaults.
        merges: whether its deltas can be merged into plain weights.
        in_peft: whether PEFT loads the files (peft_type is one of PEFT's).
        learning_rate: default for training, with `learning_rate_source` saying where it comes from.
        learning_rate_width: hidden size of the bases that `learning_rate` was found on, for methods that train
            matrices: on a base of another width it is scaled (docs/decisions/learning-rates.md). None: the rate holds
            for every width, as it does for vectors (factors, biases, norms, virtual tokens).
        files_of: name of the method whose files this one writes, and by which they are recognised; "": its own.
        trains: whether its adapters can be trained here.
    """

    name: str
    title: str
    summary: str
    paper: str
    peft_type: str
    config_class: type[Any]
    merges: bool
    in_peft: bool
    learning_rate: float
    learning_rate_source: str
    ignored_keys: frozenset[str] = field(default_factory=frozenset)
    refused_keys: Mapping[str, str] = field(default_factory=dict)
    file_defaults: Mapping[str, Any] = field(default_factory=dict)
    files_of: str = ""
    trains: bool = True
    learning_rate_width: int | None = None


@dataclass(frozen=True)
class ParameterSpec:
    """One trainable parameter: its shape and how a fresh one is filled (float32)."""

    shape: tuple[int, ...]
    init: Initialiser


class TrainingSchedule:
    """The work of a method between gradient updates while it trains; the base class does nothing.

    One instance serves one run. `state` is saved with every checkpoint and restored on resume, so everything that a
    schedule keeps belongs there.

    Attributes:
        state: tensors by name, changed in place or replaced as the run goes on.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def frozen(self, step: int) -> Collection[str]:
        """Returns the parameters that are left as they are in the update after `step` updates (0-based)."""
        return ()

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """Returns a scalar that is added to the loss, differentiable; None for none."""
        return None

    def after_update(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Called after the update number `step` (1-based), without gradient tracking, the gradients still in place."""

    def finish(self, config: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, Mapping[str, Tensor]]:
        """Returns the config and the checkpoint's tensors that are written, given the exported ones."""
        return config, tensors


@hookspec
def deltamux_method() -> MethodInfo:  # type: ignore[empty-body]  # a specification has no body
    """Describes the method. Called once, when the plugin is registered. Required."""


@hookspec
def deltamux_parameters(config: Any, base: BaseModel) -> Mapping[str, ParameterSpec]:  # type: ignore[empty-body]  # a specification
    """Train hook: declares the trainable parameters, by name.

    A fresh adapter (every parameter as initialised) must leave the base's output unchanged, unless the method's paper
    says otherwise (prefix tuning). Called once per training run. Required.

    Args:
        config: an instance of the method's config_class.
        base: the base model's sites and sizes.
    Raises:
        InvalidConfigError: the config selects nothing on this base.
    """


@hookspec
def deltamux_export(config: Any, base: BaseModel, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # type: ignore[empty-body]  # a specification
    """Train hook: computes the checkpoint's tensors (names as in the file) from the trainable parameters.

    Differentiable: training runs `deltamux_program` on its result in every step, so a reparameterisation (prefix
    tuning's MLP) is here and not in the file. Not implemented, or None: the parameters are the checkpoint's
    tensors.
    """


@hookspec
def deltamux_program(config: Any, base: BaseModel, tensors: Mapping[str, Tensor], registry: Registry) -> Program:  # type: ignore[empty-body]  # a specification
    """Inference hook: turns a checkpoint's tensors into ops at sites. Differentiable in the tensors. Required.

    Read tensors by name: ``tensors[name]`` raises the right error for a missing one, and tensors that are never read
    are refused as not belonging to the method. Shapes need no check: every op is checked against its site afterwards.
    Never change a tensor in place.

    Args:
        registry: the methods that are installed, for an adapter that holds those of others. An implementation leaves
            out the arguments that it does not use, as pluggy allows.
    Raises:
        InvalidAdapterError, BaseMismatchError: with the offending tensor, field or site.
    """


@hookspec
def deltamux_prepare(config: Any, base: BaseModel, model: nn.Module) -> bool | None:
    """Train hook: changes the loaded base in place before training, for example by quantising it.

    Called once per training run. Returns whether it changed the model: then the other hooks read the base's weights
    from its files. Not implemented, or None: the base stays as it is.
    """


@hookspec
def deltamux_weights(config: Any, base: BaseModel) -> Mapping[str, str] | None:
    """Train hook: names the base parameter that each trainable parameter is the change of.

    Training then updates the base's weights themselves, which costs what plain fine-tuning costs, and computes the
    changes when it ends: `deltamux_export` gets them, float32, in the shapes that `deltamux_parameters` declares. They
    must have the effect that `deltamux_program` gives them. A schedule sees the weights, not their changes. Called once
    per training run. Not implemented, or None, or where the base's dtype or structure forbids it: the parameters are
    trained as declared.

    Returns:
        The base parameter's name (its path in the Hugging Face model) for each declared parameter.
    """


@hookspec
def deltamux_schedule(config: Any, base: BaseModel, num_steps: int) -> TrainingSchedule | None:
    """Train hook: returns the schedule of a run: frozen parameters, a penalty, pruning.

    Called once per training run. Not implemented, or None: plain training of all parameters.

    Args:
        num_steps: updates that the run will make.
    """


@hookspec
def deltamux_merge(config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Merge hook: returns the changed base parameters by name, merged.

    Not implemented, or None: the program's ops are merged one by one.

    Raises:
        NotMergeableError: with the reason.
    """


@hookspec
def deltamux_config(config: Any, base: BaseModel) -> Mapping[str, Any]:  # type: ignore[empty-body]  # a specification
    """Train hook: returns what adapter_config.json must hold for others to load it (PEFT's bookkeeping keys).

    Not implemented, or None: the config's own fields and ``peft_type``.
    """


@hookspec
def deltamux_recognise(checkpoint: Checkpoint) -> Checkpoint | None:
    """Reads foreign checkpoints: returns the checkpoint in this method's own names, or None if it is not this method's.

    Called only where no method has the checkpoint's ``peft_type``.
    """
