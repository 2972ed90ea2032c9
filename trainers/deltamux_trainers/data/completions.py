"""Tokens of completions, from the end of the prompt to the end-of-sequence token."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from deltamux.errors import FailedPreconditionError

ANCHOR_TEXTS = ("", "\n", "=", "a")
"""Texts after which a completion is tokenised where its first token would merge with the prompt's last one."""


class Completion(NamedTuple):
    """Token ids of a completion; `ends_with_eos`: whether the server stops at the last; `after_eos`: what was cut."""

    ids: list[int]
    ends_with_eos: bool
    after_eos: list[int]


def eos_token_ids(model: str, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens at which the server stops: the tokenizer's and those of the generation config.

    Raises:
        FailedPreconditionError: the base's generation_config.json is not an object of options.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:  # without the file, the engine reads the model's config
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    except (ValueError, TypeError, AttributeError) as error:
        raise FailedPreconditionError(
            f"generation_config.json of base model {model!r} cannot be read: {str(error).partition(chr(10))[0]}",
            reason="BASE_DAMAGED",
            metadata={"file": "generation_config.json"},
        ) from error
    given: Any = config.eos_token_id
    ids = given if isinstance(given, list) else [given]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)


def tokenize_completion(
    tokenizer: Any, prompt_ids: Sequence[int], prompt: str, completion: str, encode: Callable[[Any, str], list[int]]
) -> list[int] | None:
    """Returns the tokens of a completion that follow a prompt's.

    Both are tokenised together and split where the prompt ends. Where a token would span both, the prompt keeps the
    tokens that the server sends, and the completion is tokenised after an anchor text with which it does not merge.

    Args:
        encode: how the prompt was tokenised (`deltamux.prompts.encode_text` or `encode_rendered`).

    Returns:
        None where no such tokens decode to the text.
    """
    prompt_ids = list(prompt_ids)
    together = encode(tokenizer, prompt + completion)
    if together[: len(prompt_ids)] == prompt_ids:
        return together[len(prompt_ids) :]
    texts = {_decode(tokenizer, together), _decode(tokenizer, prompt_ids) + completion}
    for anchor in ANCHOR_TEXTS:
        before: list[int] = tokenizer.encode(anchor, add_special_tokens=False)
        whole: list[int] = tokenizer.encode(anchor + completion, add_special_tokens=False)
        ids = whole[len(before) :]
        if whole[: len(before)] == before and _decode(tokenizer, prompt_ids + ids) in texts:
            return ids
    return None


def cut_at_eos(ids: Sequence[int], tokenizer: Any, eos: Collection[int]) -> Completion:
    """Cuts a turn's tokens after the first end-of-sequence token.

    Without one, they are cut after the special token that closes the turn, at which the server does not stop; and where
    no special token closes it, all are kept.
    """
    at = next((index for index, token in enumerate(ids) if token in eos), None)
    if at is not None:
        return Completion([*ids[: at + 1]], True, [*ids[at + 1 :]])
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    last = len(ids)
    while last and (ids[last - 1] in special or not _decode(tokenizer, ids[last - 1 : last]).strip()):
        last -= 1
    closing = next((index for index in range(last, len(ids)) if ids[index] in special), len(ids) - 1)
    return Completion([*ids[: closing + 1]], False, [])


def has_text_after_eos(completion: Completion, tokenizer: Any) -> bool:
    """Returns whether text, other than special tokens and whitespace, follows the end-of-sequence token."""
    return bool(tokenizer.decode(completion.after_eos, skip_special_tokens=True).strip())


def after_eos_problem(completion: Completion, tokenizer: Any, field: str) -> str:
    """Returns the problem of a field with text after an end-of-sequence token."""
    end = _decode(tokenizer, completion.ids[-1:])
    return f"has {end!r} within {field}: the server stops there and never generates what follows"


def with_eos(ids: Sequence[int], tokenizer: Any, eos: Collection[int]) -> list[int]:
    """Returns the tokens with the tokenizer's end-of-sequence token added, unless they end with one already."""
    last = len(ids) - 1
    while last >= 0 and ids[last] not in eos and not _decode(tokenizer, ids[last : last + 1]).strip():
        last -= 1
    if tokenizer.eos_token_id is None or (last >= 0 and ids[last] in eos):
        return [*ids]
    return [*ids, tokenizer.eos_token_id]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
