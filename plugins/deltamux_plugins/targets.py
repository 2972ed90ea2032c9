"""Which projections a config means: PEFT's target_modules and what goes with it, once for all methods that have it.

Patterns come with uploads, so they are matched with a time limit: a hostile one is refused, and holds up nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import regex

from deltamux.deltas import BaseModel, LinearSite
from deltamux.errors import InvalidConfigError

ALL_LINEAR = "all-linear"
SECONDS_A_MATCH = 0.05
Names = tuple[str, ...] | str


class Targeting(Protocol):
    """The fields of a config that choose its targets."""

    @property
    def target_modules(self) -> Names: ...
    @property
    def exclude_modules(self) -> Names | None: ...
    @property
    def layers_to_transform(self) -> tuple[int, ...] | int | None: ...
    @property
    def layers_pattern(self) -> Names | None: ...


@dataclass(frozen=True)
class Targeted:
    """A config that chooses its targets as PEFT's do.

    Attributes:
        target_modules: module names or their endings, a regular expression over whole paths, or "all-linear".
        exclude_modules: as target_modules; wins over it.
        layers_to_transform: layer indices to restrict the targets to.
        layers_pattern: name of the list of layers that layers_to_transform counts in.
    """

    target_modules: Names = ALL_LINEAR
    exclude_modules: Names | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Names | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", self.target_modules or ALL_LINEAR)
        check_targeting(self)


def check_targeting(config: Targeting) -> None:
    """Raises InvalidConfigError where PEFT would, too: layers of a regular expression, or a pattern without layers."""
    if _is_regex(config.target_modules) and config.layers_to_transform not in (None, ()):
        raise InvalidConfigError(
            "layers_to_transform goes with names of modules, not with a regular expression: name the layers in it",
            metadata={"field": "layers_to_transform"},
        )
    if config.layers_pattern and config.layers_to_transform in (None, ()):
        raise InvalidConfigError(
            "layers_pattern needs layers_to_transform, too", metadata={"field": "layers_to_transform"}
        )


def targets(config: Targeting, base: BaseModel) -> list[LinearSite]:
    """Returns the projections that a config means, in the model's order.

    Raises:
        InvalidConfigError: there is none, or a pattern is no regular expression.
    """
    chosen = [site for site in base.linears if _is_target(config, site)]
    if not chosen:
        raise InvalidConfigError(
            f"target_modules {config.target_modules!r} names no projection of {base.architecture}; it has: "
            + ", ".join(sorted({site.name.rpartition(".")[2] for site in base.linears})),
            metadata={"field": "target_modules"},
        )
    return chosen


def matches(names: Names, path: str) -> bool:
    """Tells whether a module is meant: by names or their endings, or by a regular expression over whole paths."""
    if isinstance(names, str):
        return fully_matches(names, path)
    return any(path == name or path.endswith(f".{name}") for name in names)


def by_pattern(patterns: Mapping[str, Any], path: str) -> Any:
    """Returns the value of the first pattern that matches the end of a path, as PEFT looks ranks and alphas up."""
    for pattern, value in patterns.items():
        if path == pattern or fully_matches(rf"(?:.*\.)?(?:{pattern})", path):
            return value
    return None


def fully_matches(pattern: str, path: str) -> bool:
    """Matches a regular expression over a whole path.

    Raises:
        InvalidConfigError: it is none, or takes too long.
    """
    try:
        return regex.fullmatch(pattern, path, timeout=SECONDS_A_MATCH) is not None
    except regex.error as error:
        raise InvalidConfigError(f"{pattern!r} is no regular expression: {error}") from error
    except TimeoutError:
        raise InvalidConfigError(f"the regular expression {pattern!r:.80} takes too long on {path!r}") from None


def spelt(config: Targeting, base: BaseModel) -> tuple[str, ...] | str:
    """Returns target_modules in a form that every version of PEFT resolves alike: ``all-linear`` by names."""
    if not is_all_linear(config.target_modules):
        return config.target_modules
    return tuple(sorted({site.name.rpartition(".")[2] for site in targets(config, base)}))


def is_all_linear(names: Names) -> bool:
    return isinstance(names, str) and names.lower() == ALL_LINEAR


def _is_regex(names: Names) -> bool:
    return isinstance(names, str) and not is_all_linear(names)


def _is_target(config: Targeting, site: LinearSite) -> bool:
    if config.exclude_modules and matches(config.exclude_modules, site.name):
        return False
    names = config.target_modules
    if not is_all_linear(names) and not matches(names, site.name):
        return False
    if config.layers_to_transform in (None, ()) or (isinstance(names, tuple) and site.name in names):
        return True
    return _in_layers(config, site)


def _in_layers(config: Targeting, site: LinearSite) -> bool:
    wanted = config.layers_to_transform
    layer: int | None = site.layer
    if config.layers_pattern:
        patterns = (config.layers_pattern,) if isinstance(config.layers_pattern, str) else config.layers_pattern
        layer = next((n for pattern in patterns if (n := _layer_behind(pattern, site.name)) is not None), None)
    return layer == wanted if isinstance(wanted, int) else layer in (wanted or ())


def _layer_behind(pattern: str, path: str) -> int | None:
    """Returns the index that stands behind the name of a list of layers."""
    try:
        found = regex.match(rf".*\.(?:{pattern})\.(\d+)\.", path, timeout=SECONDS_A_MATCH)
    except regex.error as error:
        raise InvalidConfigError(f"{pattern!r} is no regular expression: {error}") from error
    except TimeoutError:
        raise InvalidConfigError(f"the regular expression {pattern!r:.80} takes too long on {path!r}") from None
    return int(found.group(found.re.groups)) if found else None
