"""One turn of the assistant, rendered by the chat template and tokenised: the server's prompt and the completion."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from deltamux.errors import InvalidArgumentError
from deltamux.prompts import encode_rendered, render_chat
from deltamux_trainers.data.completions import (
    Completion,
    after_eos_problem,
    cut_at_eos,
    has_text_after_eos,
    tokenize_completion,
)
from deltamux_trainers.data.rows import ChatRow

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
OUTPUT_KEYS = ("tool_calls", "function_call", *REASONING_KEYS)
"""Keys of a message, next to `content`, that hold a part of the assistant's output."""

_CONTENT = "\ue000\ue001\ue000"
_MARK = "\ue000\ue002\ue000"
"""Contents of messages whose place in a rendered text can be found: private characters, which occur in no text."""
_BLOCK_OPENING = re.compile(r"\s*<([\w:-]+)>\s*")
_ENDS_IN_BLOCK_OPENING = re.compile(r"<([\w:-]+)>\s*\Z")
_EMPTY_BLOCK = re.compile(r"\s*<([\w:-]+)>\s*</\1>\s*")
"""The opening of a thinking block, a prompt that ends with one, and a block without content."""
_ARGUMENTS_MARK = '\ue000"'
"""Arguments of a call that are found in the rendered text as they are, unless the template writes them as JSON."""


class Turn(NamedTuple):
    """Token ids of one turn.

    Attributes:
        prompt_ids: the prompt that `Generate` sends for the messages before the turn.
        completion_ids: what is learnt; empty where the prompt is too long.
        ends_with_eos: whether the server stops at the last token.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    ends_with_eos: bool


def tokenize_turn(row: ChatRow, index: int, tokenizer: Any, eos: Collection[int], max_length: int) -> Turn:
    """Tokenises the assistant's message at an index as the completion of the messages before it.

    Args:
        max_length: a prompt of as many tokens has an empty completion.

    Raises:
        InvalidArgumentError: INVALID_DATA; the template refuses the messages, renders something that `Generate` cannot
            send, leaves out a part of the assistant's output, or does not render the turn after its prompt.
    """
    turn = _RenderedTurn(row, index, tokenizer)
    prompt_ids = encode_rendered(tokenizer, turn.prompt)
    if len(prompt_ids) >= max_length:
        return Turn(prompt_ids, [], True)

    def completion_of(text: str) -> Completion:
        ids = tokenize_completion(tokenizer, prompt_ids, turn.prompt, text, encode_rendered)
        if ids is None:
            raise row.error(f"has messages[{index}], which the tokenizer cannot tokenise after its prompt", "messages")
        return cut_at_eos(ids, tokenizer, eos)

    text = turn.completion()
    completion = completion_of(text)
    if not completion.ends_with_eos:
        extended, trimmed = completion_of(turn.with_next_header(text)), completion_of(turn.without_trailing_space(text))
        completion = extended if extended.ends_with_eos else trimmed
    elif has_text_after_eos(completion, tokenizer):
        field = f"messages[{index}].content"
        raise row.error(after_eos_problem(completion, tokenizer, field), field)
    return Turn(prompt_ids, completion.ids, completion.ends_with_eos)


class _RenderedTurn:
    """The text of one turn as the chat template renders it.

    Attributes:
        prompt: the text that the server renders of the messages before the turn.
    """

    def __init__(self, row: ChatRow, index: int, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise row.error(
                "has messages, but the base model's tokenizer has no chat template: use prompt and completion",
                "messages",
            )
        self._row, self._index, self._tokenizer = row, index, tokenizer
        # What a client can send: a role and a text.
        self._sendable = [{"role": m["role"], "content": m["content"] or ""} for m in row.messages[:index]]
        self.prompt = self._render(self._sendable, add_generation_prompt=True)
        self._check_prompt()

    def completion(self) -> str:
        """Returns the text after the prompt: the message as the template renders it, and what closes the turn."""
        message = self._message()
        rendered = self._render_turn(message)
        if rendered.startswith(self.prompt):
            completion = rendered[len(self.prompt) :]
            if self._holds_content(message["content"] or "", completion):
                self._check_output_keys(message, rendered)
                return completion
        return self._splice(message, rendered)

    def _holds_content(self, content: str, completion: str) -> bool:
        """Returns whether a completion holds a content, less the opening of a block that the prompt has opened."""
        block = _ENDS_IN_BLOCK_OPENING.search(self.prompt)
        rest = _without_opening(content, block[1]) if block else content
        content, completion = _without_whitespace(rest), _without_whitespace(completion)
        return content in completion if block is None or rest == content else completion.startswith(content)

    def with_next_header(self, completion: str) -> str:
        """Returns the completion with what the template adds before a message of the user; "" where it differs.

        Some templates close a turn by the header of the next one, or leave the last turn open.
        """
        conversation = [*self._sendable, self._message(), {"role": "user", "content": _MARK}]
        try:
            text, found, _ = self._render_row(conversation).partition(_MARK)
            if found and text.startswith(self.prompt + completion.rstrip()):
                return text.removeprefix(self.prompt)
            return completion + self._next_header()
        except InvalidArgumentError:  # a template that does not take a user's message there
            return ""

    def _next_header(self) -> str:
        """Returns what the template adds after a turn where the user goes on, beyond what closes the last turn."""
        turn = {"role": self._row.messages[self._index]["role"], "content": _CONTENT}
        conversation = [*self._sendable, turn, {"role": "user", "content": _MARK}]
        last = self._render_turn(turn).rpartition(_CONTENT)[2]
        between = self._render_row(conversation).partition(_MARK)[0].rpartition(_CONTENT)[2]
        return between.removeprefix(last) if between.startswith(last) else ""

    def without_trailing_space(self, completion: str) -> str:
        """Returns the completion without the whitespace after what closes the turn, unless only whitespace does."""
        content = (self._row.messages[self._index]["content"] or "").rstrip()
        closing = completion[completion.rfind(content) + len(content) :]
        return completion.rstrip() if closing.strip() else completion

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        try:
            kwargs = template_kwargs or {}
            return render_chat(self._tokenizer, messages, add_generation_prompt=add_generation_prompt, **kwargs)
        except (InvalidArgumentError, TypeError) as error:  # TypeError: a key that is a parameter of the function
            raise self._row.error(f"cannot be rendered up to messages[{self._index}]: {error}", "messages") from error

    def _render_row(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Returns messages rendered with the row's `chat_template_kwargs`."""
        kwargs = self._row.chat_template_kwargs
        return self._render(messages, add_generation_prompt=add_generation_prompt, template_kwargs=kwargs)

    def _render_turn(self, message: Mapping[str, Any]) -> str:
        return self._render_row([*self._sendable, message])

    def _check_prompt(self) -> None:
        """Refuses a row whose prompt has a part that `Generate` cannot send."""
        before = self._row.messages[: self._index]
        unsendable = [key for m in before for key, value in m.items() if key not in ("role", "content") and value]
        if not unsendable and not self._row.chat_template_kwargs:
            return
        if self._render_row([dict(m) for m in before], add_generation_prompt=True) == self.prompt:
            return
        if self._render_row(self._sendable, add_generation_prompt=True) != self.prompt:
            names, field = ", ".join(self._row.chat_template_kwargs), "chat_template_kwargs"
            problem = f"has {field} ({names})"
        else:
            field = self._first_unsendable(before)
            problem = f"has {field}"
        raise self._row.error(
            f"{problem}, which changes the prompt of messages[{self._index}], and which Generate cannot send: write it "
            "as content, or the row as prompt and completion",
            field,
        )

    def _first_unsendable(self, before: tuple[Mapping[str, Any], ...]) -> str:
        for at, message in enumerate(before):
            for key, value in message.items():
                if key not in ("role", "content") and value:
                    one = [*self._sendable[:at], {**self._sendable[at], key: value}, *self._sendable[at + 1 :]]
                    if self._render(one, add_generation_prompt=True) != self.prompt:
                        return f"messages[{at}].{key}"
        return "messages"

    def _message(self) -> dict[str, Any]:
        """Returns the message in the form that the template takes.

        That is without a null content that it would render as the word None, and without arguments of calls as JSON
        text (OpenAI's form) where it would render them as a JSON string.
        """
        message = self._with_arguments(dict(self._row.messages[self._index]))
        if message["content"] is None:
            as_text = self._render_turn({**message, "content": "None"})
            message["content"] = "" if self._render_turn(message) == as_text else None
        return message

    def _with_arguments(self, message: dict[str, Any]) -> dict[str, Any]:
        objects = _with_arguments(message)
        if objects == message:  # no arguments that are the text of an object
            return message
        try:
            rendered = self._render_turn(_with_arguments(message, _ARGUMENTS_MARK))
            return message if _ARGUMENTS_MARK in rendered else objects
        except InvalidArgumentError:  # a template that takes only objects
            return objects

    def _check_output_keys(self, message: Mapping[str, Any], rendered: str) -> None:
        """Refuses a turn whose calls or thinking the template leaves out."""
        for key in OUTPUT_KEYS:
            if message.get(key):
                without = {**{k: v for k, v in message.items() if k != key}, "content": message["content"] or ""}
                if self._render_turn(without) == rendered:
                    field = f"messages[{self._index}].{key}"
                    raise self._row.error(
                        f"has {field}, which the chat template does not render: write it as content", field
                    )

    def _splice(self, message: Mapping[str, Any], rendered: str) -> str:
        """Returns the completion where the template does not render the turn after its prompt, or not whole.

        Such are templates that leave out thinking, whose prompt opens a block (``<think>``), or that place the system
        message by the last message. The text around the content is then that around a marked one.
        """
        field = f"messages[{self._index}]"
        if any(message.get(key) for key in ("tool_calls", "function_call")):
            text = "text next to " if rendered.startswith(self.prompt) else ""
            raise self._row.error(
                f"has {text}calls in {field}, which the template does not render after its prompt", field
            )
        header, found, closing = self._render_turn({"role": message["role"], "content": _CONTENT}).partition(_CONTENT)
        difference = self._header_difference() if found and _CONTENT not in closing else None
        if difference is None:
            raise self._row.error(
                f"has {field}, which the chat template does not render as an answer to the messages before it", field
            )
        content: str = message["content"]
        lead, opened = self._with_own_block(*difference, content)
        if rendered.startswith(header) and rendered.endswith(closing):
            inner = rendered[len(header) : len(rendered) - len(closing)]
            content = inner if _without_whitespace(inner) == _without_whitespace(content) else content
        thought = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), "")
        if opened.strip():
            return lead + self._continue_block(content, opened, thought) + closing
        if thought:
            raise self._row.error(
                f"has thinking next to the content of {field}, which the template does not render after its prompt: "
                "write it as content",
                field,
            )
        return lead + content + closing

    def _with_own_block(self, lead: str, opened: str, content: str) -> tuple[str, str]:
        """Returns the header difference for a content that begins with a thinking block of its own.

        That block is the one that the prompt has opened, or takes the place of the template's empty one.
        """
        block = _ENDS_IN_BLOCK_OPENING.search(self.prompt)
        if block and lead and _without_opening(content, block[1]) != content:
            return "", block[0]
        empty = _EMPTY_BLOCK.fullmatch(lead)
        thinks = empty and _without_opening(content, empty[1]) != content and f"</{empty[1]}>" in content
        return ("", opened) if thinks else (lead, opened)

    def _header_difference(self) -> tuple[str, str] | None:
        """Returns what a turn's header has beyond the prompt, and what the prompt has beyond the header.

        Both are compared from the last message before the turn on, which is marked: the text before it may differ (a
        system message that is moved into the last user message). None where they differ otherwise.
        """
        marked = [*self._sendable[:-1], {**self._sendable[-1], "content": _MARK}]
        turn = self._render_row([*marked, {"role": "assistant", "content": _CONTENT}])
        _, in_prompt, prompt = self._render(marked, add_generation_prompt=True).rpartition(_MARK)
        _, in_turn, header = turn.partition(_CONTENT)[0].rpartition(_MARK)
        if not (in_prompt and in_turn):
            return None
        if header.startswith(prompt):
            return header[len(prompt) :], ""
        if prompt.startswith(header):
            return "", prompt[len(header) :]
        # A turn without thinking may close the block where the prompt opens it.
        block = _ENDS_IN_BLOCK_OPENING.search(prompt)
        closing = header.removeprefix(prompt[: block.start()]) if block else ""
        return (closing, "") if block and closing.startswith(f"</{block[1]}>") else None

    def _continue_block(self, content: str, opened: str, thought: str) -> str:
        """Returns the content as the continuation of the block that the prompt has opened."""
        found = _BLOCK_OPENING.fullmatch(opened)
        if found is None:
            raise self._row.error(
                f"has messages[{self._index}], whose prompt ends with {opened!r}, which the content does not continue",
                f"messages[{self._index}]",
            )
        end = f"</{found[1]}>"
        if thought:
            return f"{thought}\n{end}\n\n{content}"
        rest = _without_opening(content, found[1])
        if rest != content:
            return rest.removeprefix(opened[opened.index(">") + 1 :])
        return content if end in content else f"\n{end}\n\n{content}"


def _without_opening(content: str, block: str) -> str:
    """Returns a content without the opening of the thinking block that it begins with; itself where it has none."""
    return content.lstrip().removeprefix(f"<{block}>") if content.lstrip().startswith(f"<{block}>") else content


def _without_whitespace(text: str) -> str:
    return "".join(text.split())


def _with_arguments(message: Mapping[str, Any], replacement: str | None = None) -> dict[str, Any]:
    """Returns a message with its calls' arguments parsed where they are the text of a JSON object, or replaced."""

    def parse(function: Any) -> Any:
        text = function.get("arguments") if isinstance(function, Mapping) else None
        try:
            found = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            return function
        if not isinstance(found, dict):
            return function
        return {**function, "arguments": found if replacement is None else replacement}

    changed = dict(message)
    if isinstance(message.get("tool_calls"), list):
        changed["tool_calls"] = [
            parse({**call, "function": parse(call["function"])} if "function" in call else call)
            if isinstance(call, Mapping)
            else call
            for call in message["tool_calls"]
        ]
    if "function_call" in message:
        changed["function_call"] = parse(message["function_call"])
    return changed
