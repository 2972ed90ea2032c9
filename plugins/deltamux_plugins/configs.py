"""The common parts of several methods' configs: refusals, and the version of a file format."""

from dataclasses import dataclass

from deltamux.errors import InvalidConfigError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class VersionedConfig:
    """A config whose files have a format of deltamux's own.

    Attributes:
        format_version: of the files.
    """

    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise invalid("format_version", f"{self.format_version} is not known here; known: {FORMAT_VERSION}")


def invalid(name: str, problem: str) -> InvalidConfigError:
    """Returns the refusal of an option; the message is its name and the problem."""
    return InvalidConfigError(f"{name} {problem}", metadata={"field": name})


def check_no_bias(bias: str) -> None:
    """Raises InvalidConfigError for a file's `bias` that means trained biases."""
    if bias != "none":
        raise invalid("bias", f"{bias!r} is not served; only none is")
