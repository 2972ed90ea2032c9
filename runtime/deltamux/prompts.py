"""Prompts as token ids: the one place where conversations are rendered and text is tokenised.

The server tokenises requests with these functions and the trainers tokenise rows with them, so that what is trained is
what is served. A tokenizer is one of transformers' (`PreTrainedTokenizerBase`); nothing here loads one, and no function
keeps state, so that any thread may call them.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from deltamux.errors import FailedPreconditionError, InvalidArgumentError

MAX_WORDS = 500
"""Characters of a template's error that a message repeats; it may quote the messages."""


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text prompt, with the special tokens that the tokenizer puts around a text."""
    ids: list[int] = tokenizer.encode(text)
    return ids


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **arguments: Any
) -> str:
    """Returns a conversation as the base model's chat template renders it.

    Args:
        messages: mappings with ``role`` and ``content``, and what else the template reads of a message.
        add_generation_prompt: whether the text ends with what opens the assistant's next turn.
        arguments: further variables of the template (``tools``, ``enable_thinking``, ...); the server passes none.

    Raises:
        FailedPreconditionError: NO_CHAT_TEMPLATE, the tokenizer has none.
        InvalidArgumentError: INVALID_CHAT, the template refuses the messages, or fails on them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise FailedPreconditionError(
            "the base model's tokenizer has no chat template: send text or token ids", reason="NO_CHAT_TEMPLATE"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **arguments,
        )
    except Exception as error:  # a template is a program of the base's author, which may raise anything
        raise _refused(f"refuses these messages: {str(error)[:MAX_WORDS] or type(error).__name__}") from error
    return text


def render_chat_within(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, max_chars: int, max_seconds: float
) -> str:
    """Returns what `render_chat` does, of a template that may go on for long: it is stopped at either bound.

    Raises:
        FailedPreconditionError, InvalidArgumentError: as `render_chat`, and beyond a bound.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if not getattr(tokenizer, "chat_template", None):
        return render_chat(tokenizer, messages)
    rows = [dict(message) for message in messages]
    given = {"messages": rows, "tools": None, "documents": None, "add_generation_prompt": True}
    pieces: list[str] = []
    size, deadline = 0, time.monotonic() + max_seconds
    try:
        template = _compile_jinja_template(tokenizer.get_chat_template())
        for piece in template.generate(**tokenizer.special_tokens_map, **given):
            pieces.append(piece)
            size += len(piece)
            if size > max_chars:
                raise _refused(f"makes more than {max_chars} characters of these messages: send fewer")
            if time.monotonic() > deadline:
                raise _refused(f"takes more than {max_seconds:g} s over these messages: send fewer")
    except InvalidArgumentError:
        raise
    except Exception as error:  # as above
        raise _refused(f"refuses these messages: {str(error)[:MAX_WORDS] or type(error).__name__}") from error
    return "".join(pieces)


def _refused(problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the base model's chat template {problem}", reason="INVALID_CHAT", metadata={"field": "prompt.chat"}
    )


def encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a rendered conversation, to which a template has added its special tokens itself."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
