"""The delta ops: one file per formula, with its three forms (train, merge, serve)."""

from functools import cache
from importlib.metadata import entry_points

from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.batch import OpBatch
from deltamux.deltas.ops.bias import Bias
from deltamux.deltas.ops.bottleneck import Bottleneck
from deltamux.deltas.ops.dense import Dense
from deltamux.deltas.ops.dense_embedding import DenseEmbedding
from deltamux.deltas.ops.dense_head import DenseHead
from deltamux.deltas.ops.gated import GatedBottleneck, GatedLowRank
from deltamux.deltas.ops.kv_prefix import KVPrefix
from deltamux.deltas.ops.low_rank import LowRank
from deltamux.deltas.ops.low_rank_experts import LowRankExperts
from deltamux.deltas.ops.norm_affine import NormAffine
from deltamux.deltas.ops.scale import Scale, ScaleInput
from deltamux.deltas.ops.sign_dense import SignDense
from deltamux.deltas.ops.soft_prompt import SoftPrompt
from deltamux.deltas.ops.step import RowRange, StepIndex, VirtualRows
from deltamux.errors import InvalidAdapterError

OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        LowRank,
        GatedLowRank,
        LowRankExperts,
        Dense,
        SignDense,
        DenseEmbedding,
        DenseHead,
        Scale,
        ScaleInput,
        Bias,
        NormAffine,
        Bottleneck,
        GatedBottleneck,
        KVPrefix,
        SoftPrompt,
    )
}
"""The ops that deltamux brings; plugins add theirs: see `op_class`."""

ENTRY_POINT_GROUP = "deltamux.ops"


@cache
def op_class(name: str) -> type[Op]:
    """Returns the op of that name: deltamux's own, or the one that an installed plugin registers under it.

    Plugins register ops in the entry point group ``deltamux.ops``; only the op of that name is imported, so that a
    worker of the engine loads no plugin without adapters.

    Raises:
        InvalidAdapterError: there is none, or the plugin's cannot be imported or is not an op of that name.
    """
    if name in OPS:
        return OPS[name]
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in points:
        raise InvalidAdapterError(f"unknown op {name!r}; known: {', '.join(sorted({*OPS, *points}))}")
    try:
        loaded = points[name].load()
    except Exception as error:
        raise InvalidAdapterError(f"op {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Op) and loaded.name == name):
        raise InvalidAdapterError(f"{points[name].value} is registered as op {name!r}, but is not an op of that name")
    return loaded


__all__ = [
    "ENTRY_POINT_GROUP", "OPS", "Bias", "Bottleneck", "Dense", "DenseEmbedding", "DenseHead", "GatedBottleneck",
    "GatedLowRank", "KVPrefix", "LowRank", "LowRankExperts", "NormAffine", "Op", "OpBatch", "RowRange", "Scale",
    "ScaleInput", "SignDense", "SoftPrompt", "StepIndex", "VirtualRows", "op_class",
]  # fmt: skip
