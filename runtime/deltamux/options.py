"""Options that are declared once: fields of a dataclass, from which follow its checks and the command line's arguments.

max_num_seqs: Annotated[int, Option("most sequences in one batch", Range(1, 65536))] = 64
"""

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from deltamux.errors import InvalidConfigError

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a base's weights may have."""
DEFAULT_ADDRESS = "127.0.0.1:8470"
"""The default address of servers and clients."""


class Range(NamedTuple):
    """The numbers that an option takes; whole numbers where `low` is one.

    Attributes:
        above: whether `low` itself is excluded; below: whether `high` is.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def holds(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        # A NaN compares as false with everything.
        low, high = float(self.low), float(self.high)
        return (low < value if self.above else low <= value) and (value < high if self.below else value <= high)

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int)

    @property
    def bounds(self) -> str:
        low, high = (str(end) if isinstance(end, int) else f"{end:.10g}" for end in (self.low, self.high))
        if not (self.above or self.below):
            return f"{low} to {high}"
        return f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"

    def __str__(self) -> str:
        joined = "" if self.above else "of " if self.below else "from "
        return f"{'a whole number' if self.whole else 'a number'} {joined}{self.bounds}"


class Option(NamedTuple):
    """An option's declaration, which `typing.Annotated` attaches to a field of a dataclass.

    Attributes:
        help: one line for the command line's help; of what is on by default, what turning it off does.
        allowed: bounds of a number.
        choices: the words that it takes.
        unset: what None, the default, means.
        metavar: what the help calls the value; without one, it lists the choices in its place.
        aliases: further names on the command line.
    """

    help: str
    allowed: Range | None = None
    choices: tuple[str, ...] = ()
    unset: str = ""
    metavar: str | None = None
    aliases: tuple[str, ...] = ()


class Declared(NamedTuple):
    """A declared option with its field's type (without ``None``) and default (`dataclasses.MISSING` where required)."""

    option: Option
    kind: type
    default: Any

    def check(self, name: str, value: object) -> None:
        """Raises InvalidConfigError where the value is not one of its choices, or not a number within its bounds."""
        option = self.option
        if option.choices and value not in option.choices:
            raise invalid_option(name, f"must be one of {', '.join(option.choices)}, not {value!r}")
        if option.allowed and not option.allowed.holds(value) and not (value is None and self.default is None):
            raise invalid_option(name, f"must be {option.allowed}, not {value!r}")


def declared(options: type) -> Mapping[str, Declared]:
    """Returns the declared options of a dataclass, in the order of its fields."""
    hints = get_type_hints(options, include_extras=True)
    found = {}
    for field in dataclasses.fields(options):
        if get_origin(hint := hints[field.name]) is Annotated:
            kind, option = get_args(hint)
            if isinstance(kind, UnionType):
                (kind,) = (each for each in get_args(kind) if each is not type(None))
            found[field.name] = Declared(option, kind, field.default)
    return found


def check_declared(options: Any) -> None:
    """Checks every declared option of a dataclass's instance.

    Raises:
        InvalidConfigError: names the option, and what it takes.
    """
    for name, each in declared(type(options)).items():
        each.check(name, getattr(options, name))


def invalid_option(name: str, problem: str) -> InvalidConfigError:
    return InvalidConfigError(f"option {name} {problem}", metadata={"field": name})
