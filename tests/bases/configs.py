"""`BASES`: small random bases of the architectures that the table of bases names (`make bases`).

What they differ in is what each architecture differs in: names and fusions of projections, kinds and places of norms,
scales of embeddings and heads, experts, layers without attention. Sizes are the least that vLLM's CPU build runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deltamux.conformance.bases import byte_tokenizer

TOKENS = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
UNSET = object()
NO_HEAD_DIM = {"head_dim": UNSET}
MHA = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_ssm": 128}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
DEEPSEEK = {
    **MLA,
    **MHA,
    "head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
TEXT, VISION = "text_config", "vision_config"
ROPE_3D = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
QUARTER_ROPE = {
    "rope_parameters": {**ROPE_3D["rope_parameters"], "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
}
GLM_ROPE = {"rope_parameters": {**ROPE_3D["rope_parameters"], "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}}
QWEN_VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
LFM2 = {"conv_dim": 64, "block_dim": 64, "block_ff_dim": 128, "block_auto_adjust_ff_dim": False}
SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""As many layers, and as wide, as the language models: neither may tell the two apart."""
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

BASES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "llama": {},
        "mistral": {"sliding_window": None},
        "qwen2": {},
        "qwen3": {},
        "gemma": {"tie_word_embeddings": True},
        "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, **SLIDING},
        "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, **SLIDING},
        "phi": MHA,
        "phi3": {},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, **MHA, **NO_HEAD_DIM},
        "gpt_neox": {**MHA, **NO_HEAD_DIM},
        "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "rotary_dim": 16, "n_inner": 128, **MHA},
        "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128, **MHA, **NO_HEAD_DIM},
        "bloom": {"n_layer": 2, "n_head": 2, "tie_word_embeddings": True, **MHA, **NO_HEAD_DIM},
        "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False, **NO_HEAD_DIM},
        "falcon-new": {
            "model_type": "falcon",
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            **MHA,
            "alibi": False,
            **NO_HEAD_DIM,
        },
        "starcoder2": {},
        "olmo": {},
        "olmo2": {},
        "smollm3": {"no_rope_layers": [1, 0]},
        "stablelm": {"partial_rotary_factor": 0.5},
        "granite": {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        "glm": {"partial_rotary_factor": 0.5},
        "glm4": {"partial_rotary_factor": 0.5},
        "cohere": {"logit_scale": 0.5, "tie_word_embeddings": True},
        "cohere2": {"logit_scale": 0.5, "tie_word_embeddings": True, **SLIDING},
        "exaone4": {**SLIDING, "sliding_window_pattern": "LG"},
        "nemotron": {},
        "ernie4_5": {},
        "apertus": {},
        "hunyuan_v1_dense": {},
        "seed_oss": {},
        "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
        "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True},
        "mixtral": {**LOCAL_EXPERTS, "sliding_window": None},
        "olmoe": {**EXPERTS},
        "gpt_oss": {**LOCAL_EXPERTS, **SLIDING},
        "llama4_text": {
            **LOCAL_EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "moe_layers": [1],
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 128,
        },
        "deepseek_v2": {**DEEPSEEK, "n_group": 1},
        "deepseek_v3": {**DEEPSEEK, "n_group": 2},
        "granitemoehybrid": {
            **LOCAL_EXPERTS,
            "shared_intermediate_size": 128,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
        "falcon_h1": MAMBA2,
        "qwen3_next": {
            **EXPERTS,
            **LINEAR_ATTENTION,
            "shared_expert_intermediate_size": 64,
        },
        "mamba": {"state_size": 16, "intermediate_size": 128},
        "qwen2_vl": {
            TEXT: {**NO_HEAD_DIM, **ROPE_3D},
            VISION: {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 64, "patch_size": 14},
        },
        "qwen2_5_vl": {TEXT: {**NO_HEAD_DIM, **ROPE_3D}, VISION: {**QWEN_VISION, "patch_size": 14}},
        "qwen3_vl": {TEXT: ROPE_3D, VISION: {**QWEN_VISION, "patch_size": 16, "deepstack_visual_indexes": [0]}},
        "qwen3_vl_moe": {
            TEXT: {
                **ROPE_3D,
                **EXPERTS,
                "moe_intermediate_size": 128,
                "decoder_sparse_step": 1,
                "norm_topk_prob": True,
            },
            VISION: {**QWEN_VISION, "patch_size": 16, "deepstack_visual_indexes": [0]},
        },
        "qwen3_5": {
            TEXT: {**LINEAR_ATTENTION, "linear_key_head_dim": 64, "linear_value_head_dim": 64, **QUARTER_ROPE},
            VISION: {**QWEN_VISION, "patch_size": 16},
        },
        "glm4v": {
            TEXT: {**NO_HEAD_DIM, **GLM_ROPE, "partial_rotary_factor": 0.5, "attention_bias": True},
            VISION: {**QWEN_VISION, "patch_size": 14},
        },
        "gemma3": {
            TEXT: {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, **SLIDING},
            VISION: SIGLIP,
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": True,
        },
        "paligemma": {
            TEXT: {"model_type": "gemma", "tie_word_embeddings": True},
            VISION: {**SIGLIP, "projection_dim": 64},
            "projection_dim": 64,
            "tie_word_embeddings": True,
        },
        "llava": {TEXT: {"model_type": "llama"}, VISION: {"model_type": "clip_vision_model", **SIGLIP}},
        "mistral3": {
            TEXT: {"model_type": "mistral", "sliding_window": None},
            VISION: {"model_type": "pixtral", **SIGLIP, "head_dim": 32},
        },
        "internvl": {
            TEXT: {"model_type": "qwen2"},
            VISION: {**SIGLIP, "image_size": [28, 28], "patch_size": [14, 14]},
        },
        "idefics3": {TEXT: {"model_type": "llama"}, VISION: SIGLIP},
        "smolvlm": {TEXT: {"model_type": "llama"}, VISION: SIGLIP},
        "lfm2_vl": {
            "tie_word_embeddings": True,
            TEXT: {
                "model_type": "lfm2",
                **LFM2,
                "tie_word_embeddings": True,
                "layer_types": ["conv", "full_attention"],
            },
            VISION: {"model_type": "siglip2_vision_model", **SIGLIP, "num_patches": 4},
        },
        "llama4": {
            TEXT: {
                **LOCAL_EXPERTS,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 128,
                "moe_layers": [1],
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 128,
            },
            VISION: {**SIGLIP, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
        },
    }
)
"""Overrides of SIZES, by name: the architecture's ``model_type`` unless the row gives another.

Those of TEXT are of the language model of a base that reads images.
"""

READ_IMAGES = tuple(name for name, row in BASES.items() if VISION in row)
"""Those that read images as well."""

STORED_TRANSPOSED = ("qwen3_vl_moe",)
"""Those whose published checkpoints have their experts so; transformers reads both, and writes the other."""


def base_config(name: str, values: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Returns the `transformers.PretrainedConfig` of a base of BASES, or of another model type, with other values."""
    from transformers import AutoConfig

    given = {**BASES.get(name, {}), **values}
    if name not in READ_IMAGES:
        given = _decoder(given)
    else:
        given = {"tie_word_embeddings": False, **given, TEXT: _decoder(given[TEXT])}
    return AutoConfig.for_model(given.pop("model_type", name), **given)


def _decoder(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**SIZES, **TOKENS, **overrides}.items() if value is not UNSET}


def save_base(directory: Path, name: str, values: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Writes a random base of BASES with a tokenizer, as float32; its weights spread log-probabilities."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText if name in READ_IMAGES else AutoModelForCausalLM
    model = auto.from_config(base_config(name, values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.08)
    model.save_pretrained(directory)
    if name in STORED_TRANSPOSED:
        file = directory / "model.safetensors"
        stored = {key: t.mT.contiguous() if ".experts." in key else t for key, t in load_file(file).items()}
        save_file(stored, file, {"format": "pt"})
    byte_tokenizer().save_pretrained(directory)
    return directory
