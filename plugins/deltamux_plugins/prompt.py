"""Prompt tuning: trained embeddings before the prompt.

Lester et al. 2021, https://arxiv.org/abs/2104.08691.

    E = [P; E_prompt],   P [n, hidden]

Served as one `SoftPrompt`. Files are PEFT's: ``prompt_embeddings`` [n, hidden].
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import BaseModel, Program, SoftPrompt
from deltamux.errors import BaseMismatchError, InvalidAdapterError, InvalidConfigError, NotMergeableError
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import VirtualTokensConfig, invalid
from deltamux_plugins.peft_format import CAUSAL_LM

TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class PromptConfig(VirtualTokensConfig):
    """PEFT's PromptTuningConfig.

    Attributes:
        prompt_tuning_init: SAMPLE_VOCAB (embeddings of random tokens of the vocabulary), RANDOM (normal, as torch's
            Embedding starts) or TEXT (embeddings of a text's tokens, repeated or cut to n).
        prompt_tuning_init_text, tokenizer_name_or_path: for TEXT.
        token_dim: the hidden size; checked where given.
    """

    prompt_tuning_init: str = "SAMPLE_VOCAB"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in ("SAMPLE_VOCAB", "RANDOM", "TEXT"):
            raise invalid("prompt_tuning_init", f"is SAMPLE_VOCAB, RANDOM or TEXT, not {self.prompt_tuning_init!r}")


# Train.


@hookimpl
def deltamux_parameters(config: PromptConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    def init(tensor: Tensor) -> None:
        if config.prompt_tuning_init == "RANDOM":
            torch.nn.init.normal_(tensor)
            return
        n = config.num_virtual_tokens
        ids = _ids_of_text(config) if config.prompt_tuning_init == "TEXT" else torch.randint(base.dims.vocab_size, (n,))
        tensor.copy_(base.tensor(f"{base.embedding.name}.weight")[ids])

    return {TENSOR: ParameterSpec((config.num_virtual_tokens, base.dims.hidden_size), init)}


def _ids_of_text(config: PromptConfig) -> Tensor:
    if not (config.prompt_tuning_init_text and config.tokenizer_name_or_path):
        raise InvalidConfigError("prompt_tuning_init TEXT needs prompt_tuning_init_text and tokenizer_name_or_path")
    return text_ids(config.prompt_tuning_init_text, config.tokenizer_name_or_path, config.num_virtual_tokens)


def text_ids(text: str, tokenizer_name_or_path: str, count: int) -> Tensor:
    """Returns `count` token ids: those of the text, repeated or cut.

    Raises:
        InvalidConfigError: the tokenizer cannot be read, or makes no token of the text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name_or_path, mistral_format=False)
    except Exception as error:  # whatever a damaged file makes the parsers raise
        problem = str(error).partition("\n")[0]
        raise InvalidConfigError(
            f"tokenizer_name_or_path {tokenizer_name_or_path!r} cannot be read: {problem}",
            metadata={"field": "tokenizer_name_or_path"},
        ) from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise InvalidConfigError(f"the tokenizer makes no token of the text {text!r:.80}: give another")
    return torch.tensor((ids * -(-count // len(ids)))[:count])


@hookimpl
def deltamux_config(config: PromptConfig, base: BaseModel) -> dict[str, Any]:
    return {**asdict(config), **described(base), **CAUSAL_LM}


def described(base: BaseModel) -> dict[str, int]:
    """Returns PEFT's description of a base for methods that train embeddings."""
    return {
        "token_dim": base.dims.hidden_size,
        "num_layers": base.dims.num_layers,
        "num_attention_heads": base.dims.num_attention_heads,
        "num_transformer_submodules": 1,
    }


# Merge.


@hookimpl
def deltamux_merge(config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise NotMergeableError(
        "a soft prompt cannot be merged: it is embeddings before the prompt, not a change of any weight. Serve it "
        "as an adapter, or train LoRA instead"
    )


# Inference.


@hookimpl
def deltamux_program(config: Any, base: BaseModel, tensors: Mapping[str, Tensor]) -> Program:
    embedding = tensors[TENSOR]
    if embedding.dim() != 2 or embedding.shape[0] != config.num_virtual_tokens:
        raise InvalidAdapterError(
            f"{TENSOR} has shape {list(embedding.shape)}, but adapter_config.json says "
            f"{config.num_virtual_tokens} virtual tokens",
            metadata={"tensor": TENSOR},
        )
    if config.token_dim not in (None, base.dims.hidden_size):
        raise BaseMismatchError(
            f"the prompt was made for a base with token_dim {config.token_dim}; this one has {base.dims.hidden_size}",
            metadata={"field": "token_dim"},
        )
    return Program.of([(base.embedding.name, SoftPrompt(embedding))])


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="prompt",
        title="Prompt tuning",
        summary="embeddings before the prompt",
        paper="https://arxiv.org/abs/2104.08691",
        peft_type="PROMPT_TUNING",
        config_class=PromptConfig,
        ignored_keys=frozenset({"tokenizer_kwargs"}),
        file_defaults={"num_virtual_tokens": None},
        merges=False,
        in_peft=True,
        learning_rate=3e-2,
        learning_rate_source="Lester et al. 2021 use 0.3 with Adafactor; a tenth of it suits AdamW on small bases here",
    )
