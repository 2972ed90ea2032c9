"""The delta ops: one file each, holding all three lives of one formula."""

from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.batched import OpBatch, Run, StepIndex, VirtualRows
from deltamux.deltas.ops.bias import Bias
from deltamux.deltas.ops.bottleneck import Bottleneck
from deltamux.deltas.ops.dense import Dense
from deltamux.deltas.ops.dense_embedding import DenseEmbedding
from deltamux.deltas.ops.dense_head import DenseHead
from deltamux.deltas.ops.gated import GatedBottleneck, GatedLowRank
from deltamux.deltas.ops.kv_prefix import KVPrefix
from deltamux.deltas.ops.low_rank import LowRank
from deltamux.deltas.ops.norm_affine import NormAffine
from deltamux.deltas.ops.scale import Scale, ScaleInput
from deltamux.deltas.ops.sign_dense import SignDense
from deltamux.deltas.ops.soft_prompt import SoftPrompt

OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        LowRank,
        GatedLowRank,
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
"""Every op that a compiled program may name."""

__all__ = [
    "OPS",
    "Bias",
    "Bottleneck",
    "Dense",
    "DenseEmbedding",
    "DenseHead",
    "GatedBottleneck",
    "GatedLowRank",
    "KVPrefix",
    "LowRank",
    "NormAffine",
    "Op",
    "OpBatch",
    "Run",
    "Scale",
    "ScaleInput",
    "SignDense",
    "SoftPrompt",
    "StepIndex",
    "VirtualRows",
]
