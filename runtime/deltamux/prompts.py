"""Prompts as token ids: the one place where conversations are rendered and text is tokenised.

The server tokenises requests with these functions and the trainers tokenise rows with them, so that what is trained is
what is served. A tokenizer is one of transformers' (`PreTrainedTokenizerBase`); nothing here loads one, and no function
keeps state, so that any thread may call them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from deltamux.errors import FailedPreconditionError, InvalidArgumentError

MAX_WORDS = 500
"""Characters of a template's error that a message repeats; it may quote the messages."""

MAX_PREAMBLE = 1 << 15
"""Characters that a template may put before the content of an only message."""

PROCESSOR_FILES = ("chat_template.json", "processor_config.json")
"""Where processors of bases that read images keep a chat template which their tokenizers do not have."""

_CONTENT = "\ue000\ue004\ue000"
"""A content whose place in a rendered text can be found: private characters, which occur in no text."""
_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"), "")


def with_processor_template(tokenizer: Any, model: str) -> Any:
    """Returns a base model's tokenizer, with the chat template of its processor where it has none of its own.

    Args:
        model: the base's directory or Hugging Face id.

    Raises:
        FailedPreconditionError: BASE_DAMAGED, the file with the template is not valid.
    """
    from transformers.utils.hub import cached_file

    for name in PROCESSOR_FILES:
        if getattr(tokenizer, "chat_template", None):
            break
        found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            tokenizer.chat_template = _template_in(Path(found))
    return tokenizer


def _template_in(file: Path) -> str | None:
    try:
        template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise FailedPreconditionError(
            f"{file}, of the base model, is not a JSON object: copy or download it again", reason="BASE_DAMAGED"
        ) from error
    return template if isinstance(template, str) else None


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
            _as_taken(messages, tokenizer.get_chat_template(tools=arguments.get("tools"))),
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
    pieces: list[str] = []
    size, deadline = 0, time.monotonic() + max_seconds
    try:
        source = tokenizer.get_chat_template()
        rows = _as_taken(messages, source)
        given = {"messages": rows, "tools": None, "documents": None, "add_generation_prompt": True}
        for piece in _compile_jinja_template(source).generate(**tokenizer.special_tokens_map, **given):
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


def _as_taken(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Returns messages with each content in the form that a template reads: a text, or a list of parts."""
    rows = [dict(message) for message in messages]
    if _reads_parts_alone(template):
        for row in rows:
            if isinstance(row.get("content"), str):
                row["content"] = _parts(row["content"])
    return rows


@lru_cache(maxsize=64)
def _reads_parts_alone(template: str) -> bool:
    """Returns whether a template leaves out contents that are texts, as those of bases that read images may."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def renders(content: Any) -> bool:
        given = {"messages": [{"role": "user", "content": content}], "tools": None, "documents": None}
        text = ""
        try:
            for piece in _compile_jinja_template(template).generate(**_TOKENS, **given, add_generation_prompt=True):
                text += piece
                if _CONTENT in text or len(text) > MAX_PREAMBLE:
                    break
        except Exception:  # a template is a program of the base's author, which may raise anything
            return False
        return _CONTENT in text

    return not renders(_CONTENT) and renders(_parts(_CONTENT))


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _refused(problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the base model's chat template {problem}", reason="INVALID_CHAT", metadata={"field": "prompt.chat"}
    )


def encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a rendered conversation, to which a template has added its special tokens itself."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
