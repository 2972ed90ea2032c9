"""Reads AdapterHub's checkpoints (library `adapters`) as those of deltamux's methods.

Their adapter_config.json holds the method's options under ``config``, and the base's ``model_type``. On the decoders
below, AdapterHub calls its bottlenecks with a sub-layer's output y, the residual stream h that y is added to, and no
layer norm. So its placement options mean

    original_ln_before   W_down reads h + y instead of y
    is_parallel          W_down reads h (not the sub-layer's normalised input)
    original_ln_after, residual_before_ln   which of h and y are added back: exactly both, or it is refused

What cannot be served exactly is refused with InvalidConfigError, by the name of the option. Sub-layers that
AdapterHub leaves out get bottlenecks of zeros, of width one.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas import Checkpoint
from deltamux.deltas.activations import ACTIVATIONS
from deltamux.errors import InvalidAdapterError, InvalidConfigError
from deltamux_plugins.peft_format import CAUSAL_LM, PREFIX

LAYERS = {"llama": "model", "mistral": "model", "gpt2": "transformer"}
"""The path of the module that holds the layers, for the bases that were compared with AdapterHub's own code."""

NAMES = {"leakyrelu": "leaky_relu", "linear": "identity", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}
"""AdapterHub's activations that have another name here."""
NAMES_BEFORE_VERSIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

ROLES = {"attention": "mh_adapter", "feed_forward": "output_adapter"}
SITES = {"attention_adapters": "attention", "output_adapters": "feed_forward"}
PROJECTIONS = {"adapter_down.0": "down", "adapter_up": "up"}
MAX_LAYERS = 1024
BOTTLENECK_TENSOR = re.compile(
    r"(?:.+\.)?(?:layers|h)\.(\d+)\.(attention_adapters|output_adapters)\.adapters\.[^.]+\."
    r"(?:(adapter_down\.0|adapter_up)\.(weight|bias)|scaling)"
)
LORA_TENSOR = re.compile(r"(?:.+\.)?((?:layers|h)\.\d+\..+)\.loras\.[^.]+\.(lora_A|lora_B)")

TRAINING_ONLY = {"dropout", "dtype", "init_weights", "init_weights_seed", "stochastic_depth"}
BOTTLENECK_REFUSED = {
    "ln_before": "a trained layer norm before the bottleneck",
    "ln_after": "a trained layer norm after the bottleneck",
    "use_gating": "a gate, which looks at the whole sequence at once",
    "phm_layer": "parameterised hypercomplex layers (Compacter)",
    "inv_adapter": "an invertible adapter after the embedding",
    "cross_adapter": "adapters at cross attention",
}
BOTTLENECK_KEYS = TRAINING_ONLY | {
    *BOTTLENECK_REFUSED,
    *("mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "is_parallel", "scaling", "leave_out"),
    *("original_ln_before", "original_ln_after", "residual_before_ln", "adapter_residual_before_ln", "architecture"),
    *("inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "phm_bias"),
    *("factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank"),
}
LORA_REFUSED = {
    "use_gating": "a gate, which looks at the whole sequence at once",
    "use_dora": "DoRA, whose row norms AdapterHub takes without the scale alpha / r",
    "vera_d": "VeRA",
    "vera_b": "VeRA",
}
LORA_KEYS = TRAINING_ONLY | {
    *LORA_REFUSED,
    *("selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "r", "alpha", "attn_matrices"),
    *("composition_mode", "architecture"),
}


def recognise(checkpoint: Checkpoint, peft_type: str) -> Checkpoint | None:
    """Returns an AdapterHub checkpoint as one of the method with that peft_type; None if it is not of that method.

    Raises:
        InvalidConfigError: the checkpoint is AdapterHub's, but holds an option that cannot be served exactly.
        InvalidAdapterError: it is AdapterHub's, but a tensor does not fit its options.
    """
    options = checkpoint.config.get("config")
    if "peft_type" in checkpoint.config or "model_type" not in checkpoint.config or not isinstance(options, dict):
        return None
    source = _Source(checkpoint, str(checkpoint.config["model_type"]), options)
    found, read = source.method()
    if found != peft_type:
        return None
    config, tensors = read()
    return Checkpoint({**config, "peft_type": peft_type}, tensors, checkpoint.metadata)


Content = tuple[dict[str, Any], dict[str, Tensor]]
"""The config and the tensors of one of deltamux's methods."""


@dataclass(frozen=True)
class _Source:
    """An AdapterHub checkpoint.

    Attributes:
        model_type: transformers' name of the base's architecture.
        options: the method's.
    """

    checkpoint: Checkpoint
    model_type: str
    options: Mapping[str, Any]

    def method(self) -> tuple[str, Callable[[], Content]]:
        """Returns the peft_type of deltamux's method, and the function that reads the checkpoint as one of it."""
        if self.model_type not in LAYERS:
            raise _refused("model_type", f"{self.model_type!r}: only {', '.join(LAYERS)} were compared with AdapterHub")
        architecture = self.options.get("architecture")
        if architecture in (None, "bottleneck"):
            self._check_options(BOTTLENECK_KEYS, BOTTLENECK_REFUSED)
            return self._bottleneck_method(), self._read_bottlenecks
        if architecture == "lora":
            self._check_options(LORA_KEYS, LORA_REFUSED)
            mode = self.options.get("composition_mode", "add")
            if mode == "add":
                return "LORA", self._read_lora
            if mode == "scale":
                return "IA3", self._read_ia3
            raise _refused("composition_mode", repr(mode))
        raise _refused("architecture", f"{architecture!r}; bottlenecks and lora (also as IA3) can")

    def _check_options(self, known: set[str], refused: Mapping[str, str]) -> None:
        for name, meaning in refused.items():
            if self.options.get(name) not in (None, False):
                raise _refused(name, meaning)
        for name, value in self.options.items():
            if name not in known and value not in (None, False, "", [], {}):
                raise _refused(name, "which is not known here")

    # Bottlenecks.

    def _bottleneck_method(self) -> str:
        if self.options.get("is_parallel"):
            if self.options.get("mh_adapter"):
                raise _refused("mh_adapter", "a parallel adapter next to attention")
            return "DELTAMUX_PARALLEL"
        return "DELTAMUX_HOULSBY" if self.options.get("mh_adapter") else "DELTAMUX_PFEIFFER"

    def _read_bottlenecks(self) -> Content:
        scaling = self.options.get("scaling", 1.0)
        is_trained = scaling in ("learned", "channel")
        config = {
            "activation": self._activation(),
            "reads_residual": self._reads_residual(),
            "scale": 1.0 if is_trained else _number("scaling", scaling),
            "train_norms": False,
            "task_type": "CAUSAL_LM",
        }
        tensors, factors = self._bottleneck_tensors()
        if is_trained != bool(factors):
            raise _refused("scaling", f"{scaling!r}, with {len(factors)} trained factors in the file")
        for site, factor in factors.items():
            _multiply(tensors, site, factor)
        return config, tensors | self._left_out(tensors)

    def _activation(self) -> str:
        given = self.options.get("non_linearity")
        name = given.lower() if isinstance(given, str) else ""
        if "version" not in self.checkpoint.config:
            name = NAMES_BEFORE_VERSIONS.get(name, name)
        name = NAMES.get(name, name)
        if name not in ACTIVATIONS:
            raise _refused("non_linearity", f"{given!r}; known: {', '.join(sorted(ACTIVATIONS))}")
        return name

    def _reads_residual(self) -> bool:
        """Returns whether W_down reads the residual stream h; checks that h and y are each added back once."""
        before, after = bool(self.options.get("original_ln_before")), self.options.get("original_ln_after", True)
        if self.options.get("is_parallel"):
            if not after:
                raise _refused("original_ln_after", "false: the residual connection is lost")
            return True
        kept = self.options.get("residual_before_ln", True)
        if not isinstance(kept, bool):
            raise _refused("residual_before_ln", f"{kept!r}, which only bases that normalise after a sub-layer have")
        # The bottleneck's own connection adds y, or h + y when it is taken after h's addition.
        is_added_by_connection = before and not kept
        if bool(after) == is_added_by_connection:
            problem = "the residual connection twice" if after else "no residual connection"
            raise _refused("original_ln_after", f"{str(bool(after)).lower()} with residual_before_ln {kept}: {problem}")
        return before

    def _bottleneck_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the tensors by deltamux's names, and the trained scales by site."""
        tensors: dict[str, Tensor] = {}
        factors: dict[str, Tensor] = {}
        for name, tensor in self.checkpoint.tensors.items():
            match = BOTTLENECK_TENSOR.fullmatch(name)
            if match is None:
                raise _stray(name)
            layer, place, part, kind = match.groups()
            site = f"layers.{layer}.{SITES[place]}"
            if part is None:
                factors[site] = tensor
            else:
                tensors[f"{site}.{PROJECTIONS[part]}.{kind}"] = tensor
        return tensors, factors

    def _left_out(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns bottlenecks of zeros for the sub-layers that deltamux's method has and this adapter leaves out."""
        left_out = self.options.get("leave_out") or []
        if not all(type(layer) is int and 0 <= layer < MAX_LAYERS for layer in left_out):
            raise _refused("leave_out", f"{left_out!r}: it holds indices of layers")
        up = next((t for name, t in tensors.items() if name.endswith("up.bias") and t.dim() == 1), None)
        if up is None:
            raise InvalidAdapterError("the file holds no bottleneck", reason="MISSING_TENSOR")
        present = {(int(name.split(".")[1]), name.split(".")[2]) for name in tensors}
        roles = list(ROLES) if self._bottleneck_method() == "DELTAMUX_HOULSBY" else ["feed_forward"]
        layers = {layer for layer, _ in present} | set(left_out)
        missing = [
            f"layers.{layer}.{role}"
            for layer in sorted(layers)
            for role in roles
            if (layer, role) not in present and (layer in left_out or not self.options.get(ROLES[role]))
        ]
        return {name: tensor for site in missing for name, tensor in _zeros(site, up).items()}

    # LoRA and IA3.

    def _read_lora(self) -> Content:
        found = self._lora_tensors()
        tensors = {f"{PREFIX}{path}.{part}.weight": tensor for (path, part), tensor in found.items()}
        targets = sorted({path for path, _ in found})
        config = {"r": self.options.get("r", 8), "lora_alpha": self._alpha(8), "target_modules": targets}
        return {**config, **CAUSAL_LM}, tensors

    def _read_ia3(self) -> Content:
        alpha = self._alpha(1)
        tensors: dict[str, Tensor] = {}
        for (path, part), tensor in self._lora_tensors().items():
            if part != "lora_B":
                raise _stray(f"{path}.{part}")
            tensors[f"{PREFIX}{path}.ia3_l"] = tensor * alpha
        targets = sorted(name.removeprefix(PREFIX).removesuffix(".ia3_l") for name in tensors)
        # Unlike in the paper, all are factors of outputs, the feed-forward's too.
        return {"target_modules": targets, "feedforward_modules": [], **CAUSAL_LM}, tensors

    def _lora_tensors(self) -> dict[tuple[str, str], Tensor]:
        """Returns the tensors by the path of their module, and lora_A or lora_B."""
        if self.model_type == "gpt2" and self.options.get("selfattn_lora", True):
            raise _refused("selfattn_lora", "true on gpt2, whose attention's projections are one")
        found: dict[tuple[str, str], Tensor] = {}
        for name, tensor in self.checkpoint.tensors.items():
            match = LORA_TENSOR.fullmatch(name)
            if match is None:
                raise _stray(name)
            found[f"{LAYERS[self.model_type]}.{match[1]}", match[2]] = tensor
        if not found:
            raise InvalidAdapterError("the file holds no tensor of LoRA or IA3", reason="MISSING_TENSOR")
        return found

    def _alpha(self, default: float) -> float:
        alpha, r = _number("alpha", self.options.get("alpha", default)), self.options.get("r", default)
        version = re.match(r"adapters\.(\d+)\.(\d+)", str(self.checkpoint.config.get("version", "")))
        if version and (int(version[1]), int(version[2])) < (1, 1):
            # These trained without the scale in their files: AdapterHub loads them with alpha = r.
            return _number("r", r)
        return alpha


def _multiply(tensors: dict[str, Tensor], site: str, factor: Tensor) -> None:
    """Multiplies a trained scale, of one value or one per feature, into the projection up."""
    weight, bias = tensors.get(f"{site}.up.weight"), tensors.get(f"{site}.up.bias")
    if weight is None or bias is None or factor.shape not in ((1,), bias.shape) or weight.shape[:1] != bias.shape:
        raise InvalidAdapterError(
            f"the scaling of {site} has shape {list(factor.shape)} and does not fit its adapter_up",
            metadata={"tensor": f"{site}.scaling"},
        )
    tensors[f"{site}.up.weight"] = factor.unsqueeze(1) * weight
    tensors[f"{site}.up.bias"] = factor * bias


def _zeros(site: str, up_bias: Tensor) -> dict[str, Tensor]:
    features = up_bias.shape[0]
    shapes = {"down.weight": (1, features), "down.bias": (1,), "up.weight": (features, 1), "up.bias": (features,)}
    return {f"{site}.{name}": torch.zeros(shape, dtype=up_bias.dtype) for name, shape in shapes.items()}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(name, f"{value!r}, which is not a number")
    return value


def _refused(name: str, problem: str) -> InvalidConfigError:
    return InvalidConfigError(
        f"an AdapterHub adapter with this {name} cannot be served exactly: {problem}", metadata={"field": name}
    )


def _stray(name: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"tensor {name!r} is not part of what AdapterHub's adapter_config.json says",
        reason="UNCLAIMED_TENSOR",
        metadata={"tensor": name},
    )
