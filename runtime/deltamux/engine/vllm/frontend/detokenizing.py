"""`BoundedDetokenizer`: the text of a request's generated tokens, at a cost per token that does not grow.

vLLM's detokenizer holds tokens back until their bytes make whole characters, and decodes all of them at every step. A
prompt that ends within a character is held back, too, and would then come out as generated text, where stop strings
would be found in it; and bytes that never make a character would take the event loop longer at every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tokenizers
from vllm.v1.engine import detokenizer

if TYPE_CHECKING:
    from transformers import TokenizersBackend
    from vllm.v1.engine import EngineCoreRequest

REPLACEMENT = "\ufffd"
"""The text of bytes that are not UTF-8, or not yet."""

TAIL = 64
"""Tokens at a prompt's end after which the first generated one is decoded."""

MAX_PENDING = 32
"""Tokens that are held back at most; a character has four bytes, and so as many tokens, at most."""

LONGEST_BEGINNING = 3
"""Bytes, each a token at least, that a character which is not complete has at most."""


def install() -> None:
    """Makes vLLM use `BoundedDetokenizer` for the requests that come from now on."""
    detokenizer.FastIncrementalDetokenizer = BoundedDetokenizer  # type: ignore[misc]  # vLLM's name for its class


class BoundedDetokenizer(detokenizer.FastIncrementalDetokenizer):
    """vLLM's detokenizer of one request, which holds back at most MAX_PENDING tokens, and none of the prompt's."""

    def __init__(self, tokenizer: TokenizersBackend, request: EngineCoreRequest) -> None:
        super().__init__(tokenizer, request)
        self._pending: list[int] = []
        tail = list(request.prompt_token_ids or ())[-TAIL:]
        text = self._decode(tail)
        if text.endswith(REPLACEMENT):
            self.stream = self._stream(self._some_text())
        elif text:
            self.stream = self._stream(tail)

    def _protected_step(self, next_token_id: int) -> str | None:
        text = super()._protected_step(next_token_id)
        if text:
            self._pending.clear()
            return text
        self._pending.append(next_token_id)
        return self._release() if len(self._pending) >= MAX_PENDING else None

    def _release(self) -> str:
        """Returns the text of what is held back but for its end, which may be the beginning of a character."""
        before = self._some_text()
        skipped = len(self._decode(before))

        def text_of(ids: list[int]) -> str:
            return self._decode(before + ids)[skipped:]

        pending, whole = self._pending, text_of(self._pending)
        # Not cut within a character either.
        cuts = range(len(pending) - LONGEST_BEGINNING, len(pending) // 2, -1)
        cut = next((n for n in cuts if text_of(pending[:n]) + text_of(pending[n:]) == whole), cuts[0])
        self.stream, self._pending = self._stream(before), []
        return text_of(pending[:cut]) + "".join(self._protected_step(token) or "" for token in pending[cut:])

    def _some_text(self) -> list[int]:
        """Returns tokens after which others are decoded as within a text, with the spaces that they begin with."""
        return list(self.tokenizer.encode("a", add_special_tokens=False).ids)

    def _stream(self, before: list[int]) -> tokenizers.decoders.DecodeStream:
        return tokenizers.decoders.DecodeStream(ids=before, skip_special_tokens=self.skip_special_tokens)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens))
