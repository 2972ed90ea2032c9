"""`Prompts`: tokenises prompts off the event loop, bounded in advance, and long texts of a group one at a time."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from deltamux.engine.base import ChatMessage, Prompt
from deltamux.engine.checks import too_long
from deltamux.engine.fair import FairQueue
from deltamux.errors import InvalidArgumentError
from deltamux.prompts import encode_rendered, encode_text, render_chat_within

T = TypeVar("T")

THREADS = 2
LONG_TEXT = 1 << 16
"""Characters from which on a text is queued by group; shorter ones take a few milliseconds."""

MAX_WAITING = 64
"""Long texts of one group that may wait; one more is refused."""

TEMPLATE_SECONDS = 5.0
"""For a chat template to render the messages of one request."""


class Prompts:
    """The tokenisation of prompts. `close` it.

    Args:
        tokenizer: a tokenizer of transformers; only its chat template and `encode` are used.
        max_model_len: the context's length in tokens.
    """

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_chars = max_model_len * max(map(len, tokenizer.get_vocab()))
        self._threads = ThreadPoolExecutor(THREADS, "deltamux-tokenize")
        self._long = FairQueue(THREADS, MAX_WAITING, "long prompts", per_group=1)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def token_ids(self, prompt: Prompt, room: int, group: str) -> list[int]:
        """Returns the prompt's tokens.

        Args:
            room: tokens that it may have.
            group: of the prompt; waiting prompts are served round robin by group.
        Raises:
            InvalidArgumentError: it is longer than that, or the chat template refuses the messages.
            FailedPreconditionError: messages, and the base has no chat template.
            ResourceExhaustedError: too many long prompts of the group wait.
        """
        if isinstance(prompt, str):
            return await self._off_the_loop(len(prompt), group, lambda: self._encode(prompt, room, encode_text))
        if prompt and isinstance(prompt[0], ChatMessage):
            messages = [message._asdict() for message in prompt if isinstance(message, ChatMessage)]
            size = sum(len(message["content"]) for message in messages)
            return await self._off_the_loop(size, group, lambda: self._encode_chat(messages, room))
        return list(prompt)  # type: ignore[arg-type]  # what is left are token ids

    async def _off_the_loop(self, size: int, group: str, work: Callable[[], T]) -> T:
        if size > self._max_chars:
            raise self._too_many_characters(size)
        loop = asyncio.get_running_loop()
        if size < LONG_TEXT:
            return await loop.run_in_executor(self._threads, work)
        async with self._long.place(group):
            # The place is kept while the thread works, also when the caller has gone.
            running = loop.run_in_executor(self._threads, work)
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait([running])
                raise

    def _encode(self, text: str, room: int, encode: Callable[[Any, str], list[int]]) -> list[int]:
        """Tokenises a text; of one much too long, only as much as shows that.

        A text has about as many tokens as its beginning has, or more: a cut changes the last few at most.
        """
        if len(text) > self._max_chars:
            raise self._too_many_characters(len(text))
        size = 8 * room + LONG_TEXT // 16
        while size < len(text):
            beginning = len(encode(self._tokenizer, text[:size]))
            if beginning > room + room // 8 + 64:
                raise too_long(f"has more than {beginning} tokens", room)
            size *= 4
        return encode(self._tokenizer, text)

    def _encode_chat(self, messages: Sequence[Mapping[str, str]], room: int) -> list[int]:
        text = render_chat_within(self._tokenizer, messages, max_chars=self._max_chars, max_seconds=TEMPLATE_SECONDS)
        return self._encode(text, room, encode_rendered)

    def _too_many_characters(self, size: int) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"the prompt has {size} characters; the model's context holds at most {self._max_chars}",
            reason="PROMPT_TOO_LONG",
            metadata={"field": "prompt", "characters": str(size), "limit": str(self._max_chars)},
        )
