"""Sites: the places of a base model that a delta op may change.

A linear or norm site carries its module's path in the Hugging Face model (``model.layers.0.self_attn.q_proj``): that
is also the name that PEFT's files use. A block or attention site is named by layer and role
(``layers.0.feed_forward``), because models disagree on which module, if any, holds a sub-layer (OPT's feed-forward has
none). An experts site is a parameter, and has its path: one module holds all projections of a mixture's experts.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class SiteKind(StrEnum):
    LINEAR = "linear"
    NORM = "norm"
    BLOCK = "block"
    ATTENTION = "attention"
    EMBEDDING = "embedding"
    HEAD = "head"
    EXPERTS = "experts"


class BlockRole(StrEnum):
    """What a sub-layer does; a ``mixer`` mixes tokens without attention (Mamba, linear attention, convolution)."""

    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"
    MIXER = "mixer"


class NormForm(StrEnum):
    """The centring of a norm: ``layer`` subtracts the mean, ``rms`` does not."""

    LAYER = "layer"
    RMS = "rms"


@dataclass(frozen=True)
class LinearSite:
    """A linear projection y = W x (+ b).

    Attributes:
        transposed: the stored weight is [in, out] (GPT-2's Conv1D) instead of [out, in].
        layer: index of the decoder layer that holds it.
        block: the sub-layer it belongs to.
        is_router: it scores the experts of a mixture. The Hugging Face module multiplies by the weight itself and
            returns more than the product, so that only ops that change the weight can be here.
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    transposed: bool
    layer: int
    block: BlockRole
    is_router: bool = field(default=False, repr=False)  # fingerprints of stored programs are made of the rest
    kind = SiteKind.LINEAR


@dataclass(frozen=True)
class NormSite:
    """A normalisation over the hidden size; ``layer`` is None for the one after the last layer."""

    name: str
    features: int
    form: NormForm
    eps: float
    has_bias: bool
    layer: int | None
    kind = SiteKind.NORM


@dataclass(frozen=True)
class BlockSite:
    """A sub-layer: its input is what `input_module` reads, its output what `output_module` returns.

    The residual connection is outside: an op here changes what is added to the residual stream.

    Attributes:
        norm: the norm before the sub-layer, which reads the residual stream that the output is added to; None
            where the layer does not normalise before each sub-layer.
    """

    name: str
    features: int
    role: BlockRole
    input_module: str
    output_module: str
    layer: int
    norm: str | None = None
    kind = SiteKind.BLOCK


@dataclass(frozen=True)
class AttentionSite:
    """The key-value cache of one layer.

    Attributes:
        module: the sub-layer's path in the Hugging Face model.
        first_position: that of a sequence's first token; not a part of a base's fingerprint.
    """

    name: str
    module: str
    num_kv_heads: int
    head_dim: int
    layer: int
    first_position: int = field(default=0, repr=False)
    kind = SiteKind.ATTENTION


@dataclass(frozen=True)
class EmbeddingSite:
    """The input embedding table [vocab_size, features].

    Attributes:
        scale: what the module multiplies the table's rows by (Gemma: the root of the hidden size).
        takes_embeddings: whether the base makes the same of embeddings as of token ids; see `embedding_path`.
    """

    name: str
    vocab_size: int
    features: int
    # What stored programs name their base by is made of the rest.
    scale: float = field(default=1.0, repr=False)
    takes_embeddings: bool = field(default=True, repr=False)
    kind = SiteKind.EMBEDDING


@dataclass(frozen=True)
class HeadSite:
    """The output head: logits [vocab_size] of the last hidden state.

    Attributes:
        tied_to: name of the embedding site whose weight the head shares; None where it has one of its own.
    """

    name: str
    in_features: int
    vocab_size: int
    tied_to: str | None
    kind = SiteKind.HEAD


@dataclass(frozen=True)
class ExpertsSite:
    """One projection of every expert of a mixture, y_e = W_e x (+ b_e); all W_e are one parameter of the base.

    Attributes:
        name: the parameter's path (``model.layers.0.mlp.experts.gate_up_proj``).
        transposed: the parameter is [num_experts, in, out] instead of [num_experts, out, in].
        is_declared: the module says itself whether it is transposed (``is_transposed``). PEFT takes the parameter of a
            module that does not as [num_experts, out, in].
        layer: index of the decoder layer that holds it.
    """

    name: str
    num_experts: int
    in_features: int
    out_features: int
    transposed: bool
    is_declared: bool
    layer: int
    kind = SiteKind.EXPERTS

    @property
    def module(self) -> str:
        """The path of the module that holds the parameter, and those of the other projections of these experts."""
        return self.name.rpartition(".")[0]


Site = LinearSite | NormSite | BlockSite | AttentionSite | EmbeddingSite | HeadSite | ExpertsSite
