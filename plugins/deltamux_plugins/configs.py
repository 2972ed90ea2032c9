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


@dataclass(frozen=True)
class VirtualTokensConfig:
    """A config of PEFT's for virtual tokens.

    Attributes:
        num_virtual_tokens: n, how many there are.
        token_dim, num_layers, num_attention_heads, num_transformer_submodules: PEFT's description of the base.
    """

    num_virtual_tokens: int = 16
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.num_virtual_tokens, int) and self.num_virtual_tokens > 0):
            raise invalid("num_virtual_tokens", f"is a positive integer, not {self.num_virtual_tokens!r}")


def invalid(name: str, problem: str) -> InvalidConfigError:
    """Returns the refusal of an option; the message is its name and the problem."""
    return InvalidConfigError(f"{name} {problem}", metadata={"field": name})


def check_no_bias(bias: str) -> None:
    """Raises InvalidConfigError for a file's `bias` that means trained biases."""
    if bias != "none":
        raise invalid("bias", f"{bias!r} is not served; only none is")
