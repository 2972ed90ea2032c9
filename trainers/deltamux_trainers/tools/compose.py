"""Composition of several adapter directories into one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltamux.deltas import Checkpoint
from deltamux.deltas.composition import Component, CompositionMode, compose
from deltamux.errors import InvalidArgumentError
from deltamux.registry import Registry
from deltamux_trainers.loading import describe_base
from deltamux_trainers.output_dir import atomic_output, output_exists


@dataclass(frozen=True)
class ComposeResult:
    """The result of a composition.

    Attributes:
        rank: the largest inner dimension of an op.
        num_bytes: size of the compiled program.
    """

    output: Path
    mode: str
    parts: int
    rank: int
    num_virtual_tokens: int
    num_bytes: int


def compose_directories(
    model: str, parts: Sequence[tuple[Path, float]], output: Path, *, mode: str = "stack"
) -> ComposeResult:
    """Writes several adapters as one, whole or not at all, checked against the base.

    Args:
        parts: directories and their weights, in the order in which they apply.
    Raises:
        InvalidAdapterError, BaseMismatchError: a part is wrong, or the parts do not go together.
        FailedPreconditionError: the output exists.
    """
    if mode not in set(CompositionMode):
        raise InvalidArgumentError(f"mode is stack or sum, not {mode!r}", metadata={"field": "mode"})
    if output.exists():
        raise output_exists(f"{output} exists: choose another output")
    read = [Component(str(directory), Checkpoint.read(directory), weight) for directory, weight in parts]
    composed = compose(read, CompositionMode(mode))
    program = Registry().load(composed, describe_base(model)).program
    with atomic_output(output) as staging:
        composed.write(staging)
    return ComposeResult(output, mode, len(read), program.rank(), program.num_virtual_tokens, program.num_bytes())
