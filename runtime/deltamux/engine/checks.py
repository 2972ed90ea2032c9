"""Checks of a request against the base's vocabulary and context, before it runs. Imports no torch."""

from collections.abc import Sequence

from deltamux.engine.base import SamplingOptions
from deltamux.errors import InvalidArgumentError


def check_prompt(token_ids: Sequence[int], vocab_size: int, room: int) -> None:
    """Refuses a prompt that is empty, longer than the context's room, or has tokens outside the vocabulary.

    Args:
        room: tokens of the context without virtual tokens and one new token.
    Raises:
        InvalidArgumentError: with reason EMPTY_PROMPT, PROMPT_TOO_LONG or INVALID_TOKEN.
    """
    if not token_ids:
        raise InvalidArgumentError("the prompt is empty", reason="EMPTY_PROMPT", metadata={"field": "prompt"})
    if len(token_ids) > room:
        raise too_long(f"has {len(token_ids)} tokens", room, tokens=len(token_ids))
    wrong = next((t for t in token_ids if not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise _outside("prompt.token_ids", wrong, vocab_size)


def check_sampling(sampling: SamplingOptions, vocab_size: int, room: int) -> None:
    """Refuses options that name tokens outside the vocabulary, or need more tokens than the context has left.

    Args:
        room: tokens that the context holds after the prompt.
    Raises:
        InvalidArgumentError: with reason INVALID_TOKEN or INVALID_SAMPLING, naming the field.
    """
    for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        wrong = next((t for t in tokens if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise _outside(f"sampling.{name}", wrong, vocab_size)
    if sampling.min_tokens > room:
        raise InvalidArgumentError(
            f"min_tokens is {sampling.min_tokens}; the context leaves room for {room} after this prompt",
            reason="INVALID_SAMPLING",
            metadata={"field": "sampling.min_tokens", "limit": str(room)},
        )


def too_long(how_long: str, room: int, *, tokens: int | None = None) -> InvalidArgumentError:
    """Returns the refusal of a prompt that the context has no room for."""
    metadata = {"field": "prompt", "limit": str(room)} | ({} if tokens is None else {"tokens": str(tokens)})
    return InvalidArgumentError(
        f"the prompt {how_long}; the model's context leaves room for {room} tokens here",
        reason="PROMPT_TOO_LONG",
        metadata=metadata,
    )


def _outside(field: str, token: int, vocab_size: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field}: token id {token} is outside the vocabulary (0 to {vocab_size - 1})",
        reason="INVALID_TOKEN",
        metadata={"field": field, "token": str(token)},
    )
