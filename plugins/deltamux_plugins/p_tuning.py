"""P-tuning: embeddings before the prompt, computed by a small encoder while training.

Liu et al. 2021, https://arxiv.org/abs/2103.10385.

    P = MLP(E)  or  P = MLP(BiLSTM(E)),   E, P [n, hidden]

Served as one `SoftPrompt`. Files are PEFT's: ``prompt_embeddings`` [n, hidden], the encoder already applied.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltamux.deltas import BaseModel
from deltamux.hookspecs import MethodInfo, ParameterSpec, hookimpl
from deltamux_plugins.configs import VirtualTokensConfig, invalid
from deltamux_plugins.peft_format import CAUSAL_LM
from deltamux_plugins.prompt import TENSOR, deltamux_merge, deltamux_program, described

__all__ = [
    "deltamux_config",
    "deltamux_export",
    "deltamux_merge",
    "deltamux_method",
    "deltamux_parameters",
    "deltamux_program",
]


@dataclass(frozen=True)
class PTuningConfig(VirtualTokensConfig):
    """PEFT's PromptEncoderConfig.

    Attributes:
        encoder_reparameterization_type: MLP (three layers) or LSTM (bidirectional, two layers of MLP after it).
        encoder_hidden_size: inner width; None takes the hidden size.
        encoder_num_layers: layers of the LSTM.
    """

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_reparameterization_type not in ("MLP", "LSTM"):
            kind = self.encoder_reparameterization_type
            raise invalid("encoder_reparameterization_type", f"is MLP or LSTM, not {kind!r}")


class Encoder(nn.Module):
    """PEFT's prompt encoder: the same layers under the same names."""

    def __init__(self, config: PTuningConfig, features: int) -> None:
        super().__init__()
        inner = config.encoder_hidden_size or features
        self.embedding = nn.Embedding(config.num_virtual_tokens, features)
        if config.encoder_reparameterization_type == "LSTM":
            layers = config.encoder_num_layers
            self.lstm_head = nn.LSTM(features, inner, layers, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * inner, 2 * inner), nn.ReLU(), nn.Linear(2 * inner, features))
        else:
            hidden = [nn.Linear(features, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU()]
            self.mlp_head = nn.Sequential(*hidden, nn.Linear(inner, features))

    def forward(self) -> Tensor:
        embedded: Tensor = self.embedding.weight
        if hasattr(self, "lstm_head"):
            embedded = self.lstm_head(embedded.unsqueeze(0))[0].squeeze(0)
        encoded: Tensor = self.mlp_head(embedded)
        return encoded


# Train.


@hookimpl
def deltamux_parameters(config: PTuningConfig, base: BaseModel) -> dict[str, ParameterSpec]:
    fresh = Encoder(config, base.dims.hidden_size).state_dict()
    return {name: ParameterSpec(tuple(tensor.shape), _copy(tensor)) for name, tensor in fresh.items()}


def _copy(fresh: Tensor) -> Any:
    return lambda tensor: tensor.copy_(fresh)


@hookimpl
def deltamux_export(config: PTuningConfig, base: BaseModel, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    with torch.device("meta"):
        encoder = Encoder(config, base.dims.hidden_size)
    return {TENSOR: functional_call(encoder, dict(parameters), ())}


@hookimpl
def deltamux_config(config: PTuningConfig, base: BaseModel) -> dict[str, Any]:
    inner = config.encoder_hidden_size or base.dims.hidden_size
    return {**asdict(config), **described(base), "encoder_hidden_size": inner, **CAUSAL_LM}


# Inference and merging are prompt tuning's: the encoder is not served.


@hookimpl
def deltamux_method() -> MethodInfo:
    return MethodInfo(
        name="p_tuning",
        title="P-tuning",
        summary="embeddings before the prompt, from an encoder while training",
        paper="https://arxiv.org/abs/2103.10385",
        peft_type="P_TUNING",
        config_class=PTuningConfig,
        file_defaults={"num_virtual_tokens": None},
        merges=False,
        in_peft=True,
        learning_rate=3e-3,
        learning_rate_source="between prefix tuning's and LoRA's: the encoder multiplies the size of a step",
    )
