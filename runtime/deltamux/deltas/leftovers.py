"""Leftovers: the tensors of an adapter's file that its method does not read, and the messages about them.

PEFT's files may carry whole modules: copies of the base's own (an embedding saved for safety), or trained ones
(`modules_to_save`). A copy changes nothing and is passed over; a trained one is refused, by the name of the module.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltamux.deltas.base_model import BaseModel
from deltamux.deltas.checkpoint import check_filled
from deltamux.deltas.sites import SiteKind
from deltamux.deltas.tensor_names import PREFIX, Reading, parse, read_names, unwrapped
from deltamux.errors import DeltamuxError, InvalidAdapterError, listed

SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a projection of one expert, as checkpoints have it, and transformers before version 5."""

SINGLE_EXPERTS = (
    "projections of single experts, which are one parameter for all experts in transformers 5, and not served so: "
    "train with target_parameters"
)
SHOWN = 3
NAMING = frozenset({"MISSING_TENSOR", "UNCLAIMED_TENSOR", "INVALID_CONFIG", "RANK_MISMATCH", "BASE_MISMATCH"})
"""Reasons of errors that may come from names which PEFT does not write."""


def changed_leftovers(names: Iterable[str], tensors: Mapping[str, Tensor], base: BaseModel) -> list[str]:
    """Returns those of a file's tensors that are not copies of the base's own parameters."""
    return [name for name in names if not _is_copy(name, tensors[name], base)]


def parameter_of(name: str) -> str:
    """Returns the base's parameter that a whole module's tensor is of."""
    read = read_names([name]).names.get(name, name)
    return read.removeprefix(PREFIX).replace(".base_layer.", ".")


def leftovers_error(
    leftovers: list[str], method: str, tensors: Mapping[str, Tensor], base: BaseModel
) -> InvalidAdapterError:
    """Returns the refusal of a file with leftovers."""
    shown = listed(leftovers, SHOWN)
    problem = f"{len(leftovers)} tensor(s) of the file are not part of method {method!r} on this base: {shown}"
    about = next((words for name in leftovers if (words := _about(name, tensors[name], base))), "")
    return InvalidAdapterError(
        f"{problem}{about}", reason="UNCLAIMED_TENSOR", metadata={"tensor": leftovers[0], "count": str(len(leftovers))}
    )


def without_type(config: Mapping[str, Any]) -> InvalidAdapterError:
    """Returns the refusal of an adapter_config.json without a peft_type."""
    return InvalidAdapterError(
        "adapter_config.json has no peft_type, and is not AdapterHub's or MLX-LM's either; its keys are: "
        f"{', '.join(key[:40] for key in list(config)[:8]) or 'none'}. Save the adapter with PEFT, or write its "
        "peft_type and options as PEFT does",
        metadata={"field": "peft_type"},
    )


def explained(error: DeltamuxError, tensors: Mapping[str, Tensor], base: BaseModel) -> DeltamuxError:
    """Returns a refusal with the cause that the file's names or shapes show; the refusal itself if they show none."""
    if error.reason not in NAMING:
        return error
    if error.reason != "INVALID_CONFIG":
        try:
            check_filled(tensors)
        except InvalidAdapterError as empty:
            return empty
    reading = read_names(tensors, base.paths())
    if reading.marks:
        return _misnamed(error, reading)
    if error.reason == "MISSING_TENSOR":
        message = f"{error.message}; it holds {len(tensors)} tensor(s): {listed(sorted(tensors), SHOWN)}"
    elif hint := _grouped_query(tensors, base):
        message = f"{error.message}. {hint}"
    else:
        return error
    return _with_message(error, message)


def _misnamed(error: DeltamuxError, reading: Reading) -> DeltamuxError:
    """Returns the refusal of a file whose tensors are named otherwise than PEFT names them."""
    name, own = next((name, own) for name, own in reading.names.items() if name != own)
    several = ""
    if len(reading.adapters) > 1:
        names = listed([adapter or "(no name)" for adapter in reading.adapters], SHOWN)
        several = f" The keys hold {len(reading.adapters)} adapters: {names}."
    message = (
        f"the tensors are not named as PEFT names them in a file; their names hold {', '.join(reading.marks[:6])}. "
        f"{name[:200]!r} should be {own[:200]!r}.{several} Run `{reading.command}`, with ADAPTER the adapter's "
        "directory, and upload NEW"
    )
    renamed = _with_message(error, message)
    renamed.metadata |= {"tensor": name, "convert": reading.command}
    return renamed


def _with_message(error: DeltamuxError, message: str) -> DeltamuxError:
    return type(error)(message, reason=error.reason, metadata=error.metadata)


def _about(name: str, tensor: Tensor, base: BaseModel) -> str:
    """Returns the end of a message about a leftover: what it is; "" where that is not known."""
    parameter = parameter_of(name)
    module, _, _ = parameter.rpartition(".")
    if "token_adapter" in name or "trainable_tokens" in name:
        return "; they are trained rows of the token embedding (trainable_token_indices), which are not served"
    if SINGLE_EXPERT.search(name):
        return f"; they change {SINGLE_EXPERTS}"
    if (outside := _outside_the_decoder(name, base)) is not None:
        return (
            f"; {outside!r} is outside the base's language model, in what reads images or sound, which is not loaded "
            "here: requests have text alone. Train with the language model's modules as targets "
            f"({base.linears[0].name!r}), or exclude the others (exclude_modules)"
        )
    for kind, what in ((SiteKind.EMBEDDING, "the token embedding"), (SiteKind.HEAD, "the output head")):
        for site in base.sites.values():
            if site.kind is kind and (name.startswith(f"{PREFIX}{site.name}.") or module == site.name):
                return _about_whole(what, parameter, tensor, base)
    if parameter.endswith(".bias") and _own(parameter, base) is not None:
        return "; trained biases (bias) are not served with this method: train with bias none"
    if _own(parameter, base) is not None:
        return (
            f"; {parameter!r} differs from the base's own: modules trained whole (modules_to_save) are not served. "
            "Train without them, or merge the adapter into the base with PEFT and serve that model"
        )
    return ""


def _outside_the_decoder(name: str, base: BaseModel) -> str | None:
    """Returns the path of a tensor's module, where the base has it and it is beside the decoder, not inside."""
    read = parse(name)
    path = "" if read is None else ".".join(unwrapped(read.path))
    decoder = base.embedding.name.rpartition(".")[0]
    is_inside = path in base.paths() or path.startswith(f"{decoder}.")
    return None if is_inside or not base.has_tensor(f"{path}.weight") else path


def _about_whole(what: str, parameter: str, tensor: Tensor, base: BaseModel) -> str:
    own = _own(parameter, base)
    if own is not None and tensor.dim() == own.dim() and tensor.shape[0] != own.shape[0]:
        return (
            f"; {what} has {tensor.shape[0]} rows there, and {own.shape[0]} in this base: the vocabulary was extended. "
            "Merge the adapter into the base with PEFT, and serve that model"
        )
    return f"; the file changes {what}, which is not served: train without it, or merge with PEFT and serve that model"


def _grouped_query(tensors: Mapping[str, Tensor], base: BaseModel) -> str:
    """Returns a hint for an adapter with as many key heads as heads, which the base does not have; "" for others."""
    dims = base.dims
    queries, keys = dims.num_attention_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    if queries == keys:
        return ""
    for site in base.linears:
        own = [t for name, t in tensors.items() if name.startswith(f"{PREFIX}{site.name}.lora_B")]
        if site.out_features == keys and own and own[0].dim() == 2 and own[0].shape[0] == queries:
            return (
                f"At {site.name} the adapter has {queries} outputs, one set for each of {dims.num_attention_heads} "
                f"heads: it was made for a base without grouped queries; this one has {dims.num_kv_heads} key and value"
                " head(s)"
            )
    return ""


def _is_copy(name: str, tensor: Tensor, base: BaseModel) -> bool:
    own = _own(parameter_of(name), base)
    return own is not None and own.shape == tensor.shape and torch.equal(own, tensor.to(own.dtype))


def _own(parameter: str, base: BaseModel) -> Tensor | None:
    """Returns the base's parameter; that of the embedding for a head that shares it."""
    head = base.head
    if head is not None and head.tied_to and parameter == f"{head.name}.weight":
        parameter = f"{head.tied_to}.weight"
    return base.tensor(parameter) if base.has_tensor(parameter) else None
