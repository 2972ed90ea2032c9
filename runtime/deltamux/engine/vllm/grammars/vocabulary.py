"""The vocabulary of grammars, in which special tokens have no text, as they have none in a response."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING, Any

from deltamux.errors import InvalidArgumentError

if TYPE_CHECKING:
    import xgrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Returns the ids of the tokens that `skip_special_tokens` leaves out of the text."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {int(token) for token, what in added.items() if getattr(what, "special", False)}
    return frozenset(special | set(getattr(tokenizer, "all_special_ids", ())))


def check_stop_tokens(stop_token_ids: Iterable[int], special: Set[int]) -> None:
    """Refuses stop tokens that are text: within a grammar such a token neither ends the text nor is part of it."""
    if (text := next((token for token in stop_token_ids if token not in special), None)) is not None:
        raise InvalidArgumentError(
            f"stop_token_ids holds {text}, which is a token of text: with structured_output only special tokens may "
            "be given; a stop string may be text",
            reason="INVALID_SAMPLING",
            metadata={"field": "sampling.stop_token_ids", "token": str(text)},
        )


def vocabulary_of(backend: XgrammarBackend, tokenizer: Any) -> xgrammar.TokenizerInfo:
    """Returns the vocabulary of vLLM's backend, with special tokens that are no part of a text.

    To xgrammar `<pad>` is these five characters: a grammar would be satisfied by tokens that the text does not show.
    """
    import xgrammar

    # A compiled grammar has the vocabulary that vLLM's backend has read, from any kind of tokenizer.
    read = backend.compiler.compile_regex("a").tokenizer_info
    texts: list[Any] = list(read.decoded_vocab)
    for token in special_tokens(tokenizer):
        if token < len(texts):
            texts[token] = b""
    return xgrammar.TokenizerInfo(
        texts,
        xgrammar.VocabType.RAW,
        vocab_size=read.vocab_size,
        stop_token_ids=read.stop_token_ids,
        add_prefix_space=read.add_prefix_space,
    )
