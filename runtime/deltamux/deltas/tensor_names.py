"""The names of an adapter's tensors as PEFT's files have them, and what other writers leave in them.

PEFT writes ``base_model.model.<path of the module>.<part>``, such as
``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``. A state dict that did not pass through PEFT's own
saving holds wrappers of training (``_orig_mod``, ``module``), the adapter's name (``lora_A.default.weight``), or other
paths than the base has.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

PREFIX = "base_model.model."
_PREFIX = ("base_model", "model")
WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module"}
)
LEADING_WRAPPER = "module"
"""DistributedDataParallel's and DeepSpeed's; elsewhere in a path it may be a module's own name."""

PARTS = re.compile(
    r"(lora_|vera_|pvera_|hada_|lokr_|oft_|boft_|hra_|c3a_|delora_|randlora_|shira_|vblora_|fourierft_|miss_|bone_|road_)"
    r"\w+|ia3_l|ln_tuning_layers|modules_to_save|token_adapter"
)
LEAVES = ("weight", "bias")
BASE_LAYER = "base_layer"
LANGUAGE_MODEL = "language_model"
SHARED = ("base_model",)
"""Before the tensors that all modules of an adapter share: ``base_model.vera_A``."""


class Parsed(NamedTuple):
    """A tensor's name in pieces.

    Attributes:
        path: of the module, without PEFT's prefix and without wrappers.
        tail: the rest of the name, without the adapter's name.
        adapter: the adapter's name; "" for none.
        prefixes: how often the name begins with PEFT's prefix.
        wrappers: what was left out of the path.
    """

    path: tuple[str, ...]
    tail: tuple[str, ...]
    adapter: str
    prefixes: int
    wrappers: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """An adapter's tensors' names, read as PEFT would have written them.

    Attributes:
        names: PEFT's name by the file's.
        marks: what is different from PEFT's names, for messages.
        adapters: the names of adapters that the keys hold; more than one is ambiguous.
        needs_base: whether paths were completed by the base's own.
    """

    names: Mapping[str, str]
    marks: tuple[str, ...]
    adapters: tuple[str, ...]
    needs_base: bool

    @property
    def command(self) -> str:
        """The command that writes the adapter with these names."""
        chosen = " --adapter-name NAME" if len(self.adapters) > 1 else ""
        base = " --model BASE" if self.needs_base else ""
        return f"deltamux convert ADAPTER NEW{chosen}{base}"


def read_names(names: Iterable[str], paths: Collection[str] | None = None, adapter: str = "") -> Reading:
    """Reads the names of an adapter's tensors.

    Args:
        paths: the base's modules, where it is known: only what leads to one of them is changed. Without them,
            ``language_model`` at the start of a path and ``linear`` at its end are left out.
        adapter: the adapter to keep where the keys hold several; the tensors of others are not in `Reading.names`.
    """
    parsed = {name: parse(name) for name in names}
    ours = {name: read for name, read in parsed.items() if read is not None}
    adapters = _adapters(ours.values())
    is_adapter = any(read.tail for read in ours.values())
    marks: dict[str, None] = {}
    result: dict[str, str] = {}
    needs_base = False
    for name in parsed:
        read = ours.get(name)
        if read is None or (not is_adapter and not read.prefixes and not read.wrappers):
            result[name] = name
            continue
        if adapter and read.tail and read.adapter not in ("", adapter):
            continue
        path, path_marks, completed = _resolve(read.path, paths)
        written = _written(path, read.tail)
        if paths is not None and written != name and ".".join(unwrapped(path)) not in paths and read.path != SHARED:
            result[name] = name
            continue
        result[name] = written
        if written != name:
            # Without the base, this component would be taken for another writer's.
            needs_base |= completed or (paths is not None and LANGUAGE_MODEL in path[:2])
            marks.update(dict.fromkeys((*_marks(read), *path_marks)))
    return Reading(result, tuple(marks), adapters, needs_base)


def _adapters(read: Iterable[Parsed]) -> tuple[str, ...]:
    """Returns the adapters' names; "" among them where a tensor is there with a name and without."""
    owners: dict[tuple[tuple[str, ...], tuple[str, ...]], set[str]] = {}
    for name in read:
        owners.setdefault((name.path, name.tail), set()).add(name.adapter)
    named = {adapter for found in owners.values() for adapter in found if adapter}
    is_mixed = any("" in found and len(found) > 1 for found in owners.values())
    return tuple(sorted(named | {""} if is_mixed else named))


def parse(name: str) -> Parsed | None:
    """Returns the pieces of a tensor's name; None where its end is not known."""
    pieces = [piece for piece in name.split(".") if piece not in WRAPPERS]
    wrappers = [f"{piece}." for piece in dict.fromkeys(name.split(".")) if piece in WRAPPERS]
    prefixes = 0
    while len(pieces) > 1:
        if pieces[0] == LEADING_WRAPPER:
            pieces, wrappers = pieces[1:], [*wrappers, f"{LEADING_WRAPPER}."]
        elif tuple(pieces[:2]) == _PREFIX and len(pieces) > 2:
            pieces, prefixes = pieces[2:], prefixes + 1
        else:
            break
    at = next((i for i, piece in enumerate(pieces) if PARTS.fullmatch(piece)), len(pieces))
    path, end = tuple(pieces[:at]), pieces[at:]
    if not end:
        return Parsed(path, (), "", prefixes, tuple(wrappers))
    leaf = end[-1:] if len(end) > 1 and end[-1] in LEAVES else []
    between = end[1 : len(end) - len(leaf)]
    if len(between) > 1 or end[0] == "token_adapter":
        return None
    if end[0] == "lora_magnitude_vector":
        leaf = []
    head = [] if end[0] == "modules_to_save" else end[:1]
    return Parsed(path, (*head, *leaf), "".join(between), prefixes, tuple(wrappers))


def _written(path: tuple[str, ...], tail: tuple[str, ...]) -> str:
    front = () if path == SHARED else _PREFIX
    return ".".join((*front, *path, *tail))


def _marks(read: Parsed) -> list[str]:
    marks = [f"the wrapper {wrapper!r}" for wrapper in read.wrappers]
    if read.path != SHARED and read.prefixes != 1:
        marks.append(f"{PREFIX!r} twice" if read.prefixes else f"no {PREFIX!r} at the beginning")
    if read.adapter:
        marks.append(f"the adapter's name {read.adapter[:60]!r}")
    return marks


def unwrapped(path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the path of the module that PEFT wraps once for each of its parameters that are targets."""
    end = len(path)
    while end > 1 and path[end - 1] == BASE_LAYER:
        end -= 1
    return path[:end]


def _resolve(path: tuple[str, ...], paths: Collection[str] | None) -> tuple[tuple[str, ...], list[str], bool]:
    """Returns a module's path in the base, what was different, and whether the base was needed to complete it."""
    module = unwrapped(path)
    if module != path:
        found, marks, completed = _resolve(module, paths)
        return (*found, *path[len(module) :]), marks, completed
    candidates: list[tuple[tuple[str, ...], list[str]]] = [(path, [])]
    if LANGUAGE_MODEL in path[:2]:
        at = path.index(LANGUAGE_MODEL)
        shorter = path[:at] + path[at + 1 :]
        shorter = ("model", *shorter) if shorter[:1] == ("layers",) else shorter
        candidates += [(shorter, [*marks, "'language_model.' in the paths"]) for _, marks in candidates]
    if path[-1:] == ("linear",) and len(path) > 1:
        candidates += [(known[:-1], [*marks, "'.linear' after the paths"]) for known, marks in candidates]
    if paths is None:
        return *candidates[-1], False
    for known, marks in candidates:
        if ".".join(known) in paths:
            return known, marks, False
    for known, marks in candidates:
        whole = ".".join(known)
        longer = [p for p in paths if known and (p.endswith(f".{whole}") or whole.endswith(f".{p}"))]
        longer = longer or [p for p in paths if _bare(p.split(".")) == _bare(known)]
        if len(longer) == 1:
            return tuple(longer[0].split(".")), [*marks, f"paths such as {whole!r} for {longer[0]!r}"], True
    return path, [], False


def _bare(path: Iterable[str]) -> list[str]:
    """Returns a path without what older versions of transformers and the language model alone do not have in it."""
    return [piece for piece in path if piece != LANGUAGE_MODEL]
