"""Deltas: sites, ops, programs, the files that hold them, and the reference executor."""

from deltamux.deltas.base_model import BaseModel
from deltamux.deltas.base_support import BaseSupport
from deltamux.deltas.checkpoint import Checkpoint
from deltamux.deltas.executor import Attachment, attached
from deltamux.deltas.merge import merge_program
from deltamux.deltas.ops import (
    Bias,
    Bottleneck,
    Dense,
    DenseEmbedding,
    DenseHead,
    GatedBottleneck,
    GatedLowRank,
    KVPrefix,
    LowRank,
    LowRankExperts,
    NormAffine,
    Op,
    Scale,
    ScaleInput,
    SignDense,
    SoftPrompt,
)
from deltamux.deltas.program import PlacedOp, Placement, Program
from deltamux.deltas.sites import (
    AttentionSite,
    BlockRole,
    BlockSite,
    EmbeddingSite,
    ExpertsSite,
    HeadSite,
    LinearSite,
    NormSite,
    Site,
    SiteKind,
)

__all__ = [
    "Attachment", "AttentionSite", "BaseModel", "BaseSupport", "Bias", "BlockRole", "BlockSite", "Bottleneck",
    "Checkpoint", "Dense", "DenseEmbedding", "DenseHead", "EmbeddingSite", "ExpertsSite", "GatedBottleneck",
    "GatedLowRank", "HeadSite", "KVPrefix", "LinearSite", "LowRank", "LowRankExperts", "NormAffine", "NormSite", "Op",
    "PlacedOp", "Placement", "Program", "Scale", "ScaleInput", "SignDense", "Site", "SiteKind", "SoftPrompt",
    "attached", "merge_program",
]  # fmt: skip
