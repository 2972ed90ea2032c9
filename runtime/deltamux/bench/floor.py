"""The floor: what share of the base's speed is left if an adapter's own work costs exactly what the base's work costs.

A step reads the base's matrices once and those of every adapter in its batch once (bytes), and multiplies every row
with the base's and with its own adapter's (operations). What is slower than base / (base + adapters), by whichever of
the two bounds the machine, is overhead.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

from deltamux.bench.traffic import Workload
from deltamux.deltas import BaseModel, Program


class Work(NamedTuple):
    """The cost of one model or adapter.

    Attributes:
        parameters: that every row meets, once each.
        virtual_tokens: rows before every prompt.
    """

    parameters: int
    virtual_tokens: int = 0

    @classmethod
    def of_base(cls, base: BaseModel) -> Self:
        """Counts the projections and the output head; norms and attention itself are left out."""
        head = base.head.in_features * base.head.vocab_size if base.head else 0
        return cls(sum(s.in_features * s.out_features for s in base.linears) + head)

    @classmethod
    def of_program(cls, program: Program) -> Self:
        """Counts the parameters of all ops but those of virtual tokens, which no row meets."""
        met = (op for _, op in program if not op.virtual_tokens())
        return cls(sum(t.numel() for op in met for t in op.tensors().values()), program.num_virtual_tokens)


class Floor(NamedTuple):
    """Shares of the base's speed, in (0, 1]."""

    bytes: float
    operations: float

    def __str__(self) -> str:
        return f"{self.bytes:.2f} / {self.operations:.2f}"


def floor(base: Work, adapters: Mapping[str, Work], workload: Workload) -> Floor:
    """Returns the floor of a workload: a batch of all its adapters at once, its requests dealt evenly.

    Base and adapters are served in one dtype, so that bytes are parameters.
    """
    used = [adapters[name] if name is not None else Work(0) for name in workload.adapters]
    in_batch = {name: adapters[name] for name in workload.adapters[: workload.sequences] if name is not None}
    read = sum(work.parameters for work in in_batch.values())
    rows = workload.prompt_tokens + workload.new_tokens
    more = sum(w.parameters * (rows + w.virtual_tokens) + base.parameters * w.virtual_tokens for w in used) / len(used)
    return Floor(base.parameters / (base.parameters + read), base.parameters * rows / (base.parameters * rows + more))
