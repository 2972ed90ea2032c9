"""`Targeted`: PEFT's target_modules and the options that narrow it, for all methods that have them.

Patterns come with uploads, so they are matched with a time limit (`deltamux.patterns`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

from deltamux.deltas import BaseModel, LinearSite
from deltamux.deltas.leftovers import SINGLE_EXPERT, SINGLE_EXPERTS
from deltamux.errors import InvalidConfigError, listed
from deltamux.patterns import match
from deltamux_plugins.configs import invalid
from deltamux_plugins.peft_defaults import LORA_TARGETS, Names, default_targets
from deltamux_plugins.peft_format import CAUSAL_LM

ALL_LINEAR = "all-linear"
CACHED = 64
_PLAIN = re.compile(r"\^?(?:[\w-]*+\.)*+([\w-]++)", re.ASCII)
"""A pattern without operators but dots, and its ending: most are paths of modules."""


@dataclass(frozen=True)
class Targeted:
    """A config that chooses its targets as PEFT's do.

    Attributes:
        peft_targets: PEFT's default target_modules, by transformers' model type.
        target_modules: module names or their endings, a regular expression over whole paths, "all-linear", or None:
            PEFT's default for the base's model type.
        exclude_modules: as target_modules; takes precedence.
        layers_to_transform: layer indices to restrict the targets to.
        layers_pattern: name of the list of layers that layers_to_transform counts in.
        modules_to_save: modules that PEFT trained whole; none of them is a target. Served where the file's copies equal
            the base's.
    """

    peft_targets: ClassVar[Mapping[str, Names]] = LORA_TARGETS

    target_modules: Names | None = ALL_LINEAR
    exclude_modules: Names | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Names | None = None
    modules_to_save: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Raises InvalidConfigError where PEFT would: layers of a regular expression, or a pattern without layers."""
        if _is_regex(self.target_modules) and self.layers_to_transform not in (None, ()):
            raise invalid(
                "layers_to_transform",
                "goes with names of modules, not with a regular expression: name the layers in it",
            )
        if self.layers_pattern and self.layers_to_transform in (None, ()):
            raise InvalidConfigError(
                "layers_pattern needs layers_to_transform, too", metadata={"field": "layers_to_transform"}
            )

    @property
    def has_other_targets(self) -> bool:
        """Whether the config names other targets than modules, so that target_modules may match none."""
        return False


def targets(config: Targeted, base: BaseModel) -> list[LinearSite]:
    """Returns the projections that a config matches, in the model's order.

    Raises:
        InvalidConfigError: there is none, and nothing else is a target; or a pattern is not a regular expression.
    """
    names = config.target_modules
    if names is None:
        names = default_targets(config.peft_targets, base, otherwise=() if config.has_other_targets else None)
    chosen = [site for site in base.linears if _is_target(config, names, site)]
    if not chosen and not config.has_other_targets:
        raise nothing_matches(names, [site.name for site in base.linears], base, "projection", _narrowed(config))
    return chosen


def nothing_matches(
    names: Names, paths: list[str], base: BaseModel, kind: str, narrowed: str = ""
) -> InvalidConfigError:
    """Returns the refusal of a config with target_modules that match none of the modules at `paths`.

    Args:
        kind: of the modules: projection, norm.
        narrowed: the options that leave out matches of target_modules; "" for none.
    """
    endings = sorted({path.rpartition(".")[2] for path in paths})
    has = f"this base has: {listed(endings, 12, 80)}"
    if not names:
        problem = f"target_modules is empty: name the modules that the adapter was trained at; {has}"
    elif isinstance(names, str) and not is_all_linear(names) and any(matches((names,), path) for path in paths):
        example = next(path for path in paths if matches((names,), path))
        expression = json.dumps(rf".*\.{names}")
        problem = (
            f"target_modules is the string {names!r}: PEFT takes a string as a regular expression over whole paths "
            f"such as {example!r}, and this one matches none. Write {expression}, or the list {json.dumps([names])}"
        )
    elif isinstance(names, str) and not is_all_linear(names):
        problem = (
            f"target_modules {names[:200]!r} is a regular expression over whole paths, and matches no {kind} of "
            f"{base.architecture}, whose paths are such as {paths[0]!r}; {has}"
        )
    elif narrowed and any(matches(names, path) for path in paths):
        problem = f"{narrowed} leave none of the {kind}s that target_modules names; {has}"
    else:
        shown = names if isinstance(names, str) else listed(names, chars=80)
        problem = (
            f"target_modules ({shown}) names no {kind} of {base.architecture}; {has}. The adapter was made for "
            f"{_made_for(names, base)}"
        )
    return InvalidConfigError(problem, metadata={"field": "target_modules"})


def _made_for(names: Names, base: BaseModel) -> str:
    """Returns what an adapter is for that targets no module of a base's language model."""
    stored = () if base.files is None or isinstance(names, str) else base.files.names()
    named = [name for name in stored if matches(names, name.rpartition(".")[0])]
    if any(SINGLE_EXPERT.search(name) for name in named):
        return SINGLE_EXPERTS
    decoder = base.embedding.name.rpartition(".")[0]
    if any(not name.startswith(f"{decoder}.") for name in named):
        return "what reads images or sound in this base, which is not loaded: requests have text alone"
    return "a model of another family: serve it on that one"


def _narrowed(config: Targeted) -> str:
    options = ("exclude_modules", "layers_to_transform", "modules_to_save")
    return " and ".join(name for name in options if getattr(config, name) not in (None, (), ""))


def matches(names: Names, path: str) -> bool:
    """Returns whether names or their endings, or a regular expression over whole paths, match a module's path."""
    if isinstance(names, str):
        return fully_matches(names, path)
    parts, known = path.split("."), _set_of(names)
    return any(".".join(parts[start:]) in known for start in range(len(parts)))


@lru_cache(maxsize=CACHED)
def _set_of(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


def by_pattern(patterns: Mapping[str, Any], path: str) -> Any:
    """Returns the value of the first pattern that matches the end of a path, as PEFT finds ranks and alphas."""
    for pattern, value in patterns.items():
        if _may_match(pattern, path) and match(rf"(.*\.)?({pattern})$", path):
            return value
    return patterns.get(path)


def _may_match(pattern: str, path: str) -> bool:
    """Whether a path ends as a pattern does: a cheap test, as there may be a pattern per module."""
    plain = _PLAIN.fullmatch(pattern)
    return plain is None or path.endswith(plain[1])


def fully_matches(pattern: str, path: str) -> bool:
    """Matches a regular expression over a whole path.

    Raises:
        InvalidConfigError: it is not one, or takes too long.
    """
    return match(pattern, path, whole=True) is not None


def peft_values(config: Targeted, base: BaseModel) -> dict[str, Any]:
    """Returns the values of adapter_config.json, with targets by name, which every version of PEFT reads alike."""
    names = config.target_modules
    if names is None or is_all_linear(names):
        names = tuple(sorted({site.name.rpartition(".")[2] for site in targets(config, base)}))
    return {**asdict(replace(config, target_modules=names)), **CAUSAL_LM}


def fan_in_fan_out(config: Targeted, base: BaseModel) -> dict[str, bool]:
    """Returns PEFT's key for targets whose weights are transposed (GPT-2's)."""
    return {"fan_in_fan_out": any(site.transposed for site in targets(config, base))}


def is_all_linear(names: Names | None) -> bool:
    return isinstance(names, str) and names.lower() == ALL_LINEAR


def _is_regex(names: Names | None) -> bool:
    return isinstance(names, str) and not is_all_linear(names)


def is_left_out(config: Any, path: str) -> bool:
    """Returns whether exclude_modules or modules_to_save leave a module out of the targets."""
    if config.exclude_modules and matches(config.exclude_modules, path):
        return True
    return any(match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ())


def _is_target(config: Targeted, names: Names, site: LinearSite) -> bool:
    if is_left_out(config, site.name):
        return False
    if not is_all_linear(names) and not matches(names, site.name):
        return False
    if config.layers_to_transform in (None, ()) or (isinstance(names, tuple) and site.name in names):
        return True
    return _in_layers(config, site.name)


def _in_layers(config: Targeted, path: str) -> bool:
    wanted = config.layers_to_transform
    layer = _layer(config.layers_pattern, path)
    return layer is not None and (layer == wanted if isinstance(wanted, int) else layer in (wanted or ()))


def _layer(layers_pattern: Names | None, path: str) -> int | None:
    """Returns the index of a path's layer: after the name of a list of layers, or the first after two names."""
    patterns = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern or ()
    if not layers_pattern:
        expressions = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    else:
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    found = next((one for expression in expressions if (one := match(expression, path))), None)
    return int(found.group("idx")) if found else None
