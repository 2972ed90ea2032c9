"""Composition of stored versions into the files of a new one; no plugin's code is involved."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from deltamux.deltas import Checkpoint
from deltamux.deltas.composition import Component, CompositionMode, compose
from deltamux.errors import InvalidArgumentError
from deltamux.store import AdapterKey, AdapterStore, VersionKey
from deltamux.v1 import adapters_pb2 as pb


class NamedPart(NamedTuple):
    """A part as it is named in a request."""

    name: str
    key: AdapterKey | VersionKey
    weight: float


def mode_of(mode: pb.CompositionMode.ValueType) -> CompositionMode:
    modes = {pb.COMPOSITION_MODE_STACK: CompositionMode.STACK, pb.COMPOSITION_MODE_SUM: CompositionMode.SUM}
    if mode not in modes:
        raise InvalidArgumentError(
            "set mode: STACK applies the parts one after the other, SUM adds them", metadata={"field": "mode"}
        )
    return modes[mode]


def stage_composition(store: AdapterStore, parts: Sequence[NamedPart], mode: CompositionMode, staged: Path) -> None:
    """Writes the files of a composition into an empty directory; the parts are leased meanwhile.

    Raises:
        NotFoundError: there is no such adapter or version.
        DataLossError: the stored files of a part are damaged.
        InvalidArgumentError, BaseMismatchError: see `compose`.
    """
    with ExitStack() as leases:
        read: list[Component] = []
        for part in parts:
            record = leases.enter_context(store.lease(part.key))
            read.append(Component(str(record.key), Checkpoint.read(store.programs.checked_upload(record)), part.weight))
        compose(read, mode).write(staged)
