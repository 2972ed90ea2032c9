"""Completions as token ids: what follows the prompt that the server sends, up to the token at which it stops."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from deltamux.errors import FailedPreconditionError

ANCHORS = ("", "\n", "=", "a")
"""Texts behind which a completion is tokenised where it would merge with its prompt; the first that fits is taken."""


class Completion(NamedTuple):
    """Token ids that are learnt; `ended`: whether the last one ends a generation; `beyond`: what would follow it."""

    ids: list[int]
    ended: bool
    beyond: list[int]


def end_tokens(model: str, tokenizer: Any) -> frozenset[int]:
    """Returns the ids at which the server ends a generation: the tokenizer's and those of the generation config.

    Raises:
        FailedPreconditionError: the base's generation_config.json is not an object of options.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:  # none: the engine takes the model's config for it
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


def follow(
    tokenizer: Any, prompt_ids: Sequence[int], prompt: str, completion: str, encode: Callable[[Any, str], list[int]]
) -> list[int] | None:
    """Returns the tokens of a completion behind a prompt's.

    Both are tokenised together and split where the prompt ends. Where the two merge over the border, the prompt keeps
    the tokens that the server sends, and the completion is tokenised behind a text with which it does not merge.

    Args:
        encode: how the prompt was tokenised (`deltamux.prompts.encode_text` or `encode_rendered`).

    Returns:
        None where no such tokens make the text.
    """
    prompt_ids = list(prompt_ids)
    together = encode(tokenizer, prompt + completion)
    if together[: len(prompt_ids)] == prompt_ids:
        return together[len(prompt_ids) :]
    texts = {_decode(tokenizer, together), _decode(tokenizer, prompt_ids) + completion}
    for anchor in ANCHORS:
        before: list[int] = tokenizer.encode(anchor, add_special_tokens=False)
        whole: list[int] = tokenizer.encode(anchor + completion, add_special_tokens=False)
        ids = whole[len(before) :]
        if whole[: len(before)] == before and _decode(tokenizer, prompt_ids + ids) in texts:
            return ids
    return None


def up_to_the_end(ids: Sequence[int], tokenizer: Any, ends: Collection[int]) -> Completion:
    """Cuts a turn's tokens behind the first that ends a generation.

    Where there is none, they are cut behind the special token that closes the turn, though the server does not stop at
    it; and where no special token closes it, all are kept.
    """
    at = next((index for index, token in enumerate(ids) if token in ends), None)
    if at is not None:
        return Completion([*ids[: at + 1]], True, [*ids[at + 1 :]])
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    last = len(ids)
    while last and (ids[last - 1] in special or not _decode(tokenizer, ids[last - 1 : last]).strip()):
        last -= 1
    closing = next((index for index in range(last, len(ids)) if ids[index] in special), len(ids) - 1)
    return Completion([*ids[: closing + 1]], False, [])


def says_more(completion: Completion, tokenizer: Any) -> bool:
    """Tells whether text, not special tokens or space alone, follows the token that ends a generation."""
    return bool(tokenizer.decode(completion.beyond, skip_special_tokens=True).strip())


def never_generated(completion: Completion, tokenizer: Any, field: str) -> str:
    """Returns what is wrong with a field of a row that goes on behind the token that ends a generation."""
    end = _decode(tokenizer, completion.ids[-1:])
    return f"has {end!r} within {field}: the server stops there and never generates what follows"


def closed(ids: Sequence[int], tokenizer: Any, ends: Collection[int]) -> list[int]:
    """Returns the tokens with the tokenizer's end-of-sequence token behind them, unless they end with one already."""
    last = len(ids) - 1
    while last >= 0 and ids[last] not in ends and not _decode(tokenizer, ids[last : last + 1]).strip():
        last -= 1
    if tokenizer.eos_token_id is None or (last >= 0 and ids[last] in ends):
        return [*ids]
    return [*ids, tokenizer.eos_token_id]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
