"""PEFT's default target_modules, by transformers' model type, for decoders."""

from collections.abc import Mapping
from functools import cache

from deltamux.deltas import BaseModel
from deltamux.errors import InvalidConfigError

Names = tuple[str, ...] | str

_Q_V = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)
LORA_TARGETS: Mapping[str, Names] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4", "mistral"), _Q_V),
    **dict.fromkeys(("mixtral", "opt", "qwen2", "qwen3", "stablelm"), _Q_V),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), _FUSED),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "codegen": ("qkv_proj",),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
}
VERA_TARGETS: Mapping[str, Names] = {**LORA_TARGETS, "phi": _Q_V}
_NOT_IN_ADALORA = ("codegen", "falcon", "mistral", "mixtral", "mpt", "phi", "stablelm")
ADALORA_TARGETS: Mapping[str, Names] = {
    **{kind: names for kind, names in LORA_TARGETS.items() if kind not in _NOT_IN_ADALORA},
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
_RMS = ("input_layernorm", "post_attention_layernorm", "norm")
_GEMMA2 = (*_RMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
LN_TARGETS: Mapping[str, Names] = {
    **dict.fromkeys(("gemma", "llama", "mistral"), _RMS),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
    **dict.fromkeys(("bloom", "falcon"), ("input_layernorm", "post_attention_layernorm", "ln_f")),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gptj": ("ln_1", "ln_f"),
    "phi": ("input_layernorm", "final_layernorm"),
}
IA3_FEEDFORWARD: Mapping[str, Names] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "llama4", "mistral", "qwen2", "qwen3"), ("down_proj",)),
    **dict.fromkeys(("falcon", "gpt_neox"), ("dense_4h_to_h",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",)),
    **dict.fromkeys(("opt", "phi"), ("fc2",)),
    "bloom": ("mlp.dense_4h_to_h",),
    "gpt_neo": ("c_proj",),
    "gptj": ("fc_out",),
    "mixtral": ("w2",),
}
_IA3_ATTENTION: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama4", "phi", "qwen2", "qwen3"), _Q_V),
    **dict.fromkeys(("llama", "mistral", "mixtral"), ("k_proj", "v_proj")),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), _FUSED),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "opt": ("q_proj", "k_proj"),
}
IA3_TARGETS: Mapping[str, Names] = {name: (*_IA3_ATTENTION[name], *IA3_FEEDFORWARD[name]) for name in IA3_FEEDFORWARD}


def default_targets(known: Mapping[str, Names], base: BaseModel, *, otherwise: Names | None = None) -> Names:
    """Returns PEFT's default target_modules on this base.

    Args:
        otherwise: what they are where PEFT has no default for the base's model type.
    Raises:
        InvalidConfigError: it has none, and neither is `otherwise` given.
    """
    kinds = model_types(base.architecture)
    for kind in kinds:
        if kind in known:
            return known[kind]
    if otherwise is not None:
        return otherwise
    raise InvalidConfigError(
        f"target_modules is null, and PEFT has no default for {kinds[0] if kinds else base.architecture}: write the "
        "modules that the adapter was trained at into adapter_config.json",
        metadata={"field": "target_modules"},
    )


@cache
def model_types(architecture: str) -> list[str]:
    """Returns transformers' model types whose causal model is of that class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture]
