"""Small random bases of several architectures: what sites differ in, they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "opt")
"""Between them: fused and transposed projections, biases or none, tied heads or not, both kinds of norms."""


def save_base(directory: Path, architecture: str) -> Path:
    """Writes a random two-layer base of one of ARCHITECTURES, with a tokenizer, as float32.

    Weights are drawn wide, so that log-probabilities are spread and every adapter visibly changes what is generated.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(architecture))  # type: ignore[no-untyped-call]  # untyped in transformers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.08)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def _config(architecture: str) -> Any:
    from transformers import GPT2Config, LlamaConfig, OPTConfig, Qwen2Config, Qwen3Config

    tokens: dict[str, Any] = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if architecture == "gpt2":
        return GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=256, **tokens)
    if architecture == "opt":
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "max_position_embeddings": 256,
        }
        return OPTConfig(num_hidden_layers=2, num_attention_heads=2, **sizes, **tokens)
    family: Any = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[architecture]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    head = {"head_dim": 32} if architecture == "qwen3" else {}
    return family(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        **sizes,
        **head,
        **tokens,
    )


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet[: 256 - len(special)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it so
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
