"""Loading of base models and tokenizers; a base whose files lack weights is refused."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from deltamux.adapter_files import CONFIG_FILE
from deltamux.deltas import BaseModel
from deltamux.deltas.base_model import auto_model, read_base_config
from deltamux.errors import DeltamuxError, FailedPreconditionError, listed
from deltamux.prompts import with_processor_template

SHOWN = 3
"""Names of weights that an error lists."""


def describe_base(model: str) -> BaseModel:
    """Returns the description of a base model; its weights are read only for the fingerprint.

    Raises:
        FailedPreconditionError: it cannot be read, or is not a decoder; its files lack weights, which transformers
            would initialise at random, or hold an adapter, which transformers would add to the weights, or an output
            head other than the embedding that the config ties it to.
    """
    base = BaseModel.from_pretrained(model)
    if (Path(model) / CONFIG_FILE).is_file():
        raise _with_adapter(model)
    with _quiet():
        try:
            loaded: Any = _pretrained(model, device_map="meta", output_loading_info=True)
        except Exception as error:  # damaged files raise errors of many classes
            raise _unloadable(model, error) from error
    if getattr(loaded[0], "_hf_peft_config_loaded", False):  # of a Hugging Face id
        raise _with_adapter(model)
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise FailedPreconditionError(
            f"the files of base model {model!r} lack {listed(missing, SHOWN)}, which would be initialised at random: "
            f"it is not a whole {base.architecture}. Give a base that was saved with its output head",
            reason="BASE_INCOMPLETE",
            metadata={"tensor": missing[0]},
        )
    _check_tied(base)
    return base


def _check_tied(base: BaseModel) -> None:
    """Raises FailedPreconditionError where the output head differs from the embedding that the config ties it to.

    transformers then loads two tensors, and the engine one.
    """
    head = base.head
    if head is None or head.tied_to is None:
        return
    own, shared = f"{head.name}.weight", f"{head.tied_to}.weight"
    if base.has_tensor(own) and not torch.equal(base.tensor(own), base.tensor(shared)):
        raise FailedPreconditionError(
            f"config.json of base model {base.name!r} ties {own} to {shared} (tie_word_embeddings), but its files hold "
            "two that differ: it would be served otherwise than trained. Set tie_word_embeddings to false where "
            f"both are meant, or remove {own} from the files",
            reason="BASE_AMBIGUOUS",
            metadata={"tensor": own},
        )


def load_tokenizer(model: str) -> Any:
    """Loads a base model's tokenizer.

    Raises:
        FailedPreconditionError: the base has no tokenizer files, or damaged ones.
    """
    try:
        # As the engine does: a base may have Mistral's own files next to the Hugging Face ones, or code of its own.
        tokenizer = AutoTokenizer.from_pretrained(model, mistral_format=False, trust_remote_code=False)
        return with_processor_template(tokenizer, model)
    except DeltamuxError:
        raise
    except Exception as error:  # damaged files raise errors of many classes
        problem = str(error).partition("\n")[0]
        raise FailedPreconditionError(
            f"the tokenizer of base model {model!r} cannot be read: {problem}. Its files (tokenizer.json and "
            "tokenizer_config.json) belong in the directory of the weights",
            reason="TOKENIZER_NOT_FOUND",
        ) from error


def load_model(model: str, dtype: str, device: str) -> nn.Module:
    """Loads the weights of a base that `describe_base` accepts."""
    try:
        loaded: Any = _pretrained(model, dtype=getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _unloadable(model, error) from error
    moved: nn.Module = loaded.to(pick_device(device))
    return moved


def _pretrained(model: str, **options: Any) -> Any:
    """Returns what transformers loads as the model of a directory or id, which may read images as well."""
    return auto_model(read_base_config(model)).from_pretrained(model, **options)


def pick_device(device: str) -> str:
    """Returns torch's name of a device: auto is a GPU if there is one; each rank has a GPU of its own.

    Raises:
        FailedPreconditionError: there is no such GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    _, _, index = device.partition("cuda:")
    if device.startswith("cuda") and int(index or 0) >= torch.cuda.device_count():
        raise FailedPreconditionError(
            f"device {device} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "give --device cpu, or install a CUDA build of torch on a machine with a GPU",
            reason="DEVICE_NOT_FOUND",
            metadata={"device": device},
        )
    return device


def _with_adapter(model: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"base model {model!r} holds an adapter_config.json next to its weights: transformers adds that adapter to "
        "them whenever it loads them, and the server does not. Move the adapter's files to a directory of their own",
        reason="BASE_HOLDS_ADAPTER",
        metadata={"file": CONFIG_FILE},
    )


def _unloadable(model: str, error: Exception) -> FailedPreconditionError:
    problem = str(error).strip().partition("\n")[0] or type(error).__name__
    return FailedPreconditionError(f"base model {model!r} cannot be loaded: {problem}", reason="BASE_NOT_LOADABLE")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' messages on a load, whose problems become errors here."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # as above
