"""`BaseModel`: a base's sites, sizes and fingerprint, and its tensors by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltamux.deltas.discovery import Dimensions, discover
from deltamux.deltas.sites import (
    AttentionSite,
    BlockSite,
    EmbeddingSite,
    ExpertsSite,
    HeadSite,
    LinearSite,
    NormSite,
    Site,
    SiteKind,
)
from deltamux.deltas.stored_check import check_architecture, check_stored
from deltamux.deltas.weights import WeightFiles
from deltamux.errors import BaseMismatchError, FailedPreconditionError, QuantisedBaseError

TensorReader = Callable[[str], Tensor]
"""Returns the base model's parameter of that name (its path in the Hugging Face model); KeyError if it has none."""


@dataclass(frozen=True)
class BaseModel:
    """The description of a base: enough to place, check and create deltas without loading the model.

    Attributes:
        architecture: class name of the Hugging Face model, such as ``LlamaForCausalLM``.
        num_parameters: of the whole model, tied ones counted once.
        fingerprint: 32 hex digits over sites and a sample of every weight; "" where the weights are not at hand. The
            sample is taken in bfloat16, so that a copy of the base saved in bfloat16 keeps its fingerprint.
        name: directory or Hugging Face id that it was read from; "" where it was not.
        files: its weights; None where they are not at hand, or in memory alone.
    """

    architecture: str
    dims: Dimensions
    sites: Mapping[tuple[SiteKind, str], Site]
    num_parameters: int = 0
    fingerprint: str = ""
    name: str = field(default="", compare=False)
    files: WeightFiles | None = field(default=None, repr=False, compare=False)
    _read: TensorReader | None = field(default=None, repr=False, compare=False)
    _model: nn.Module | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_config(cls, config: Any) -> BaseModel:
        """Describes the model of a `transformers.PretrainedConfig`, built on the meta device: no weights, no memory.

        Raises:
            FailedPreconditionError: it is not a decoder.
        """
        return cls._describe(_without_weights(config), config)

    @classmethod
    def from_model(cls, model: nn.Module) -> BaseModel:
        """Describes a loaded Hugging Face causal model; its tensors are those of its parameters."""
        return cls._describe(model, model.config).reading(model)

    @classmethod
    def from_pretrained(cls, model: str | Path) -> BaseModel:
        """Describes the model of a directory or Hugging Face id, reading config and the sampled weights only.

        Raises:
            FailedPreconditionError: there is no such model, it is not a decoder of the usual structure, or weights are
                missing.
        """
        config = read_base_config(model)
        check_architecture(config)
        described = cls.from_checkpoint(config, model)
        assert described.files is not None
        if getattr(config, "quantization_config", None) is None:
            check_stored(described.sites.values(), described.files)
        return replace(described, fingerprint=_fingerprint(described, described.files), name=str(model))

    @classmethod
    def from_checkpoint(cls, config: Any, model: str | Path) -> BaseModel:
        """Describes the model of a config whose weights are in a directory, or that of a Hugging Face id.

        Raises:
            FailedPreconditionError: it is not a decoder, or the weights are missing or damaged.
        """
        built = _without_weights(config)
        files = WeightFiles.locate(model).named_for(built)
        return replace(cls._describe(built, config), files=files, _read=files.read)

    @classmethod
    def _describe(cls, model: nn.Module, config: Any) -> BaseModel:
        dims = Dimensions.of(config)
        sites = {(site.kind, site.name): site for site in discover(model, dims)}
        return cls(type(model).__name__, dims, sites, sum(p.numel() for p in model.parameters()))

    def reading(self, model: nn.Module) -> BaseModel:
        """Returns this description of a loaded model: tensors, keys and values come from it instead of from files."""
        parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return replace(self, _read=lambda name: parameters[name].detach(), _model=model)

    @property
    def linears(self) -> list[LinearSite]:
        """The projections that are modules of their own: all but the routers of mixtures."""
        return [s for s in self.sites.values() if isinstance(s, LinearSite) and not s.is_router]

    @property
    def routers(self) -> list[LinearSite]:
        return [s for s in self.sites.values() if isinstance(s, LinearSite) and s.is_router]

    @property
    def experts(self) -> list[ExpertsSite]:
        return [s for s in self.sites.values() if isinstance(s, ExpertsSite)]

    @property
    def norms(self) -> list[NormSite]:
        return [s for s in self.sites.values() if isinstance(s, NormSite)]

    @property
    def blocks(self) -> list[BlockSite]:
        return [s for s in self.sites.values() if isinstance(s, BlockSite)]

    @property
    def attentions(self) -> list[AttentionSite]:
        return [s for s in self.sites.values() if isinstance(s, AttentionSite)]

    @property
    def embedding(self) -> EmbeddingSite:
        return next(s for s in self.sites.values() if isinstance(s, EmbeddingSite))

    @property
    def head(self) -> HeadSite | None:
        """The output head; None where it is not a plain projection."""
        return next((s for s in self.sites.values() if isinstance(s, HeadSite)), None)

    def paths(self) -> set[str]:
        """Returns the paths of sites, and of modules that hold sites: what tensors of adapters are named by."""
        return {site.name for site in self.sites.values()} | {site.module for site in self.experts}

    def site(self, kind: SiteKind, name: str) -> Site:
        """Returns the site, or raises BaseMismatchError naming it: the delta was made for another base."""
        try:
            return self.sites[kind, name]
        except KeyError:
            raise BaseMismatchError(
                f"the base model {self.architecture} has no {kind} site {name!r}: the adapter was made for another "
                "base, or names its modules otherwise",
                metadata={"site": name, "kind": str(kind)},
            ) from None

    def has_tensor(self, name: str) -> bool:
        """Returns whether the base has a parameter of that name, and its value can be read."""
        try:
            self.tensor(name)
        except (BaseMismatchError, QuantisedBaseError):
            return False
        return True

    def tensor(self, name: str) -> Tensor:
        """Returns the base's parameter of that name in its stored dtype; do not write to it."""
        if self._read is None:
            raise FailedPreconditionError(
                f"the weights of the base model are not at hand, and {name!r} is needed", reason="BASE_WEIGHTS_MISSING"
            )
        try:
            return self._read(name)
        except KeyError:
            raise BaseMismatchError(
                f"the base model {self.architecture} has no parameter {name!r}", metadata={"tensor": name}
            ) from None

    @torch.no_grad()
    def keys_and_values(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Runs the base on token ids [n]; returns what every layer's cache holds then, each [n, kv_heads, head_dim].

        Raises:
            FailedPreconditionError: the model is not at hand.
        """
        from transformers import AutoConfig, DynamicCache

        if self._model is None and not self.name:
            raise FailedPreconditionError(
                "the base model is not at hand, and its keys and values are needed", reason="BASE_WEIGHTS_MISSING"
            )
        model: Any = self._model or auto_model(AutoConfig.from_pretrained(self.name)).from_pretrained(self.name)
        cache: Any = DynamicCache()  # without the config, so that no layer forgets what leaves its window
        training = model.training
        rows = ids.unsqueeze(0).to(next(model.parameters()).device)
        model.eval()(input_ids=rows, past_key_values=cache, use_cache=True)
        model.train(training)
        return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]


def auto_model(config: Any) -> Any:
    """Returns the class of transformers' that builds and loads the model of a config, which may read images as well."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = AutoModelForCausalLM._model_mapping
    with_images = type(config) not in known and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM


def read_base_config(model: str | Path) -> Any:
    """Returns transformers' config of a directory or Hugging Face id.

    Raises:
        FailedPreconditionError: BASE_NOT_FOUND; there is none, or it is not valid.
    """
    from transformers import AutoConfig

    try:
        # Not None, with which transformers would ask on the terminal.
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except ImportError:
        raise
    except Exception as error:  # transformers' checks raise errors of many kinds
        if "trust_remote_code" in str(error):
            raise FailedPreconditionError(
                f"base model {str(model)!r} brings code of its own (auto_map in config.json) for a type that "
                "transformers does not have: bases are served and trained as transformers and vLLM implement them",
                reason="UNSUPPORTED_BASE",
            ) from error
        raise FailedPreconditionError(
            f"base model {str(model)!r} cannot be read: {_sentence(error)}. Give a directory with config.json and "
            "safetensors, or a Hugging Face id",
            reason="BASE_NOT_FOUND",
        ) from error


def _sentence(error: Exception) -> str:
    plain = isinstance(error, OSError | ValueError)
    return f"{'' if plain else f'{type(error).__name__}: '}{' '.join(str(error).split())}"


def _without_weights(config: Any) -> nn.Module:
    """Returns the model of a config, on the meta device."""
    _check_decoder(config)
    try:
        with torch.device("meta"):
            model: nn.Module = auto_model(config).from_config(config)
    except ValueError as error:
        raise _not_a_decoder(config, f"not known to transformers as one that generates text ({error})") from error
    except ImportError:
        raise
    except Exception as error:  # whatever transformers' code makes of a value in it
        raise FailedPreconditionError(
            f"transformers cannot build the base model of its config.json: {_sentence(error)}",
            reason="UNSUPPORTED_BASE",
        ) from error
    return model


def _check_decoder(config: Any) -> None:
    """Raises FailedPreconditionError for encoders, and for models with an encoder.

    transformers builds them as decoders all the same, with an output head that was never trained.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if getattr(config, "is_encoder_decoder", False):
        raise _not_a_decoder(config, "an encoder with a decoder")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        raise _not_a_decoder(config, "an encoder")


def _not_a_decoder(config: Any, what: str) -> FailedPreconditionError:
    named = ", ".join(getattr(config, "architectures", None) or [config.model_type])
    return FailedPreconditionError(
        f"the base model ({named}) is {what}: only causal language models (decoders), such as LlamaForCausalLM, can be "
        "bases",
        reason="NOT_A_DECODER",
        metadata={"architecture": named, "model_type": str(config.model_type)},
    )


def _fingerprint(base: BaseModel, files: WeightFiles) -> str:
    digest = hashlib.sha256(base.architecture.encode())
    for site in base.sites.values():
        digest.update(json.dumps(repr(site)).encode())
    for name in files.names():
        digest.update(name.encode())
        digest.update(files.sample(name).tobytes())
    return digest.hexdigest()[:32]
