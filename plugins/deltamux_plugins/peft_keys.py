"""Keys of PEFT's LoRA configs that change what is computed and are not served: each with its version and effect.

A key is refused only where it is set: null, false and empty values change nothing.
"""

from collections.abc import Mapping

_EFFECTS: Mapping[str, tuple[str, str]] = {
    "alora_invocation_tokens": ("0.18", "changes the tokens after an invocation alone (activated LoRA)"),
    "arrow_config": ("0.18", "routes each token between several adapters (Arrow)"),
    "ensure_weight_tying": ("0.18", "trains the embedding and the output head as one"),
    "enable_lora": ("0.1", "holds factors for parts of a fused projection; PEFT dropped it in 0.3"),
    "kasa_config": ("0.21", "takes singular values out of the base's weights (KaSA)"),
    "layer_replication": ("0.10", "builds a deeper base out of copies of its layers"),
    "lora_bias": ("0.14", "trains a bias of lora_B"),
    "megatron_config": ("0.7", "attaches to Megatron's parallel projections"),
    "monteclora_config": ("0.20", "draws the factors from a distribution (MonteCLoRA)"),
    "target_parameters": ("0.17", "changes parameters that are not projections, such as the experts of a mixture"),
    "trainable_token_indices": ("0.15", "trains rows of the token embedding"),
    "use_bdlora": ("0.19", "makes the factors block-diagonal (BD-LoRA)"),
    "use_qalora": ("0.16", "pools the inputs of lora_A by groups (QA-LoRA)"),
    "velora_config": ("0.20", "compresses what lora_A reads (VeLoRA)"),
}
_ADVICE = "train without it, or merge the adapter into the base with PEFT and serve that model"


def _reasons(*left_out: str, **more: str) -> dict[str, str]:
    reasons = {key: f"PEFT {version} brought it, and it {does}" for key, (version, does) in _EFFECTS.items()}
    return {key: f"{reason}; {_ADVICE}" for key, reason in {**reasons, **more}.items() if key not in left_out}


LORA_REFUSED: Mapping[str, str] = _reasons("target_parameters")
ADALORA_REFUSED: Mapping[str, str] = _reasons(
    use_dora="PEFT's AdaLoRA has no DoRA",
    use_rslora="PEFT's AdaLoRA has no rank-stabilised scale",
)
