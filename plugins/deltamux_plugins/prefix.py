"""Prefix tuning: trained keys and values before every layer's cache.

Li & Liang 2021, https://arxiv.org/abs/2101.00190; without the MLP in every layer, it is P-tuning v2 (Liu et al. 2022,
https://arxiv.org/abs/2110.07602).

    K_l = [P_l^K; K_l],  V_l = [P_l^V; V_l],   P [n, 2 layers, kv_heads, head_dim]
    reparameterised while training: P = MLP(E), E [n, kv_heads * head_dim]

Without the MLP, P starts as the keys and values that the base itself computes for n tokens, which Li & Liang 2021 find
much better than random values.

Served as a `KVPrefix` at every attention. Files are PEFT's: ``prompt_embeddings``
[n, layers * 2 * kv_heads * head_dim], the MLP already applied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, KVPrefix, Program
from deltamux.errors import BaseMismatchError, InvalidAdapterError, NotMergeableError
from deltamux.hookspecs import Initialiser, MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import VirtualTokensConfig, invalid
from deltamux_plugins.peft_format import CAUSAL_LM
from deltamux_plugins.prompt import text_ids

TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class PrefixConfig(VirtualTokensConfig):
    """PEFT's PrefixTuningConfig.

    Attributes:
        prefix_projection: whether training goes through the MLP; the files are the same either way.
        encoder_hidden_size: inner width of the MLP; None takes kv_heads * head_dim.
        init_weights: None (the base's keys and values for a text or for random tokens of its vocabulary; with
            prefix_projection as torch's Embedding and Linear start), "normal" (as PEFT starts) or "zero".
        init_text: the text to start from, its tokens repeated or cut to n; None takes random tokens.
        tokenizer_name_or_path: for init_text; None takes the base's own. PEFT's files hold neither.
        token_dim, num_layers, num_attention_heads: kv_heads * head_dim, layers and kv_heads; checked where given.
    """

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None
    init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "normal", "zero"):
            raise invalid("init_weights", f"is null, 'normal' or 'zero', not {self.init_weights!r}")
        if self.init_text and (self.prefix_projection or self.init_weights):
            raise invalid("init_text", "goes neither with prefix_projection nor with init_weights")
        if self.num_transformer_submodules not in (None, 1):
            raise invalid("num_transformer_submodules", "is 1 for a decoder")

    def check(self, base: BaseModel) -> None:
        """Raises BaseMismatchError where the config describes another base than the present one."""
        own = {
            "token_dim": _token_dim(base),
            "num_layers": base.dims.num_layers,
            "num_attention_heads": base.dims.num_kv_heads,
        }
        for name, expected in own.items():
            given = getattr(self, name)
            if given is not None and given != expected:
                raise BaseMismatchError(
                    f"the prefix was made for a base with {name} {given}; this one has {expected}",
                    metadata={"field": name},
                )


# Train.


@hookimpl
def deltamux_parameters(config: PrefixConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    config.check(base)
    n, token_dim = config.num_virtual_tokens, _token_dim(base)
    flat = base.dims.num_layers * 2 * token_dim
    if not config.prefix_projection:
        return {TENSOR: ParameterSpec((n, flat), _start(config, base))}
    hidden = config.encoder_hidden_size or token_dim
    zero, last = config.init_weights == "zero", torch.nn.init.zeros_
    return {
        "embedding": ParameterSpec((n, token_dim), torch.nn.init.normal_),
        "transform.0.weight": ParameterSpec((hidden, token_dim), _uniform(token_dim)),
        "transform.0.bias": ParameterSpec((hidden,), _uniform(token_dim)),
        "transform.2.weight": ParameterSpec((flat, hidden), last if zero else _uniform(hidden)),
        "transform.2.bias": ParameterSpec((flat,), last if zero else _uniform(hidden)),
    }


def _start(config: PrefixConfig, base: BaseModel) -> Initialiser:
    def of_the_base(tensor: Tensor) -> None:
        n = config.num_virtual_tokens
        ids = text_ids(config.init_text, config.tokenizer_name_or_path or base.name, n) if config.init_text else None
        if ids is None:
            ids = torch.randint(base.dims.vocab_size, (n,))
        pairs = [part for pair in base.keys_and_values(ids) for part in pair]
        tensor.copy_(torch.stack(pairs, 1).reshape(tensor.shape))

    if config.init_weights is None:
        return of_the_base
    return torch.nn.init.zeros_ if config.init_weights == "zero" else torch.nn.init.normal_


@hookimpl
def deltamux_export(config: PrefixConfig, base: BaseModel, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not config.prefix_projection:
        return parameters
    hidden = parameters["embedding"] @ parameters["transform.0.weight"].t() + parameters["transform.0.bias"]
    return {TENSOR: torch.tanh(hidden) @ parameters["transform.2.weight"].t() + parameters["transform.2.bias"]}


@hookimpl
def deltamux_config(config: PrefixConfig, base: BaseModel) -> dict[str, Any]:
    return {
        "num_virtual_tokens": config.num_virtual_tokens,
        "prefix_projection": config.prefix_projection,
        "encoder_hidden_size": config.encoder_hidden_size or _token_dim(base),
        "init_weights": "zero" if config.init_weights == "zero" else None,
        "token_dim": _token_dim(base),
        "num_layers": base.dims.num_layers,
        "num_attention_heads": base.dims.num_kv_heads,
        "num_transformer_submodules": 1,
        **CAUSAL_LM,
    }


# Merge.


@hookimpl
def deltamux_merge(config: PrefixConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise NotMergeableError(
        "prefix tuning cannot be merged: its prefix is keys and values before the cache, not a change of any "
        "weight. Serve it as an adapter, or train LoRA instead",
        metadata={"method": "prefix"},
    )


# Inference.


@hookimpl
def deltamux_program(config: PrefixConfig, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    config.check(base)
    flat = tensors[TENSOR]
    expected = (config.num_virtual_tokens, base.dims.num_layers * 2 * _token_dim(base))
    if flat.dim() != 2 or flat.shape[0] != expected[0]:
        raise InvalidAdapterError(
            f"{TENSOR} has shape {list(flat.shape)}, but adapter_config.json says {expected[0]} virtual tokens",
            metadata={"tensor": TENSOR},
        )
    if tuple(flat.shape) != expected:
        raise BaseMismatchError(
            f"{TENSOR} has shape {list(flat.shape)}, but this base model needs {list(expected)}",
            metadata={"tensor": TENSOR},
        )
    dims = base.dims
    pairs = flat.view(expected[0], 2 * dims.num_layers, dims.num_kv_heads, dims.head_dim).unbind(1)
    return Program.of(
        (site.name, KVPrefix(key=pairs[2 * site.layer], value=pairs[2 * site.layer + 1])) for site in base.attentions
    )


def _token_dim(base: BaseModel) -> int:
    return base.dims.num_kv_heads * base.dims.head_dim


def _uniform(fan_in: int) -> Any:
    bound = fan_in**-0.5
    return lambda tensor: torch.nn.init.uniform_(tensor, -bound, bound)


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="prefix",
        title="Prefix tuning",
        summary="keys and values before every layer's cache",
        paper="https://arxiv.org/abs/2101.00190",
        peft_type="PREFIX_TUNING",
        config_class=PrefixConfig,
        file_defaults={"num_virtual_tokens": None},
        merges=False,
        in_peft=True,
        learning_rate=1e-2,
        learning_rate_source="the upper end of P-tuning v2's published scripts: 5e-3 to 1e-2",
    )
