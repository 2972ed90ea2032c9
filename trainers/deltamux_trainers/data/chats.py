"""Turns of a conversation as token ids: the prompt that the server sends for the turn, and what it is to answer."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from deltamux.errors import InvalidArgumentError
from deltamux.prompts import encode_rendered, render_chat
from deltamux_trainers.data.completions import Completion, follow, never_generated, says_more, up_to_the_end
from deltamux_trainers.data.rows import ChatRow

SAID_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold a part of what the assistant says."""
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")

_CONTENT = "\ue000\ue001\ue000"
_MARK = "\ue000\ue002\ue000"
"""Contents of messages that show what a template puts around them: private characters, in no text."""
_OPENED = re.compile(r"\s*<([\w:-]+)>\s*")
_OPENS = re.compile(r"<([\w:-]+)>\s*\Z")
_NO_THOUGHT = re.compile(r"\s*<([\w:-]+)>\s*</\1>\s*")
"""A block of thinking that a template has opened, that a prompt ends with, and one without a thought."""


_AS_TEXT = '\ue000"'
"""Arguments of a call that a template renders as they are, unless it makes JSON of them."""


class Turn(NamedTuple):
    """Token ids of one turn.

    Attributes:
        context: what `Generate` makes of the messages before the turn.
        completion: what is learnt; empty where the context is too long.
        ended: whether the server stops at its last token.
    """

    context: list[int]
    completion: list[int]
    ended: bool


def encode_turn(row: ChatRow, index: int, tokenizer: Any, ends: Collection[int], max_length: int) -> Turn:
    """Tokenises the assistant's message at an index as the answer to the messages before it.

    Args:
        max_length: tokens of a context from which on its answer is not looked at.

    Raises:
        InvalidArgumentError: INVALID_DATA; the template refuses the messages, renders something that `Generate` cannot
            send, leaves out something that the assistant says, or does not let the turn follow its prompt.
    """
    rendering = _Rendering(row, index, tokenizer)
    context = encode_rendered(tokenizer, rendering.prompt)
    if len(context) >= max_length:
        return Turn(context, [], True)
    answer = rendering.answer()
    completion = _completion(row, index, tokenizer, ends, context, rendering.prompt, answer)
    if not completion.ended:
        behind = _completion(row, index, tokenizer, ends, context, rendering.prompt, rendering.behind(answer))
        closed = _completion(row, index, tokenizer, ends, context, rendering.prompt, rendering.without_space(answer))
        completion = behind if behind.ended else closed
    elif says_more(completion, tokenizer):
        field = f"messages[{index}].content"
        raise row.refused(never_generated(completion, tokenizer, field), field)
    return Turn(context, completion.ids, completion.ended)


def _completion(
    row: ChatRow, index: int, tokenizer: Any, ends: Collection[int], context: list[int], prompt: str, answer: str
) -> Completion:
    ids = follow(tokenizer, context, prompt, answer, encode_rendered)
    if ids is None:
        raise row.refused(f"has messages[{index}], which the tokenizer cannot tokenise behind its prompt", "messages")
    return up_to_the_end(ids, tokenizer, ends)


class _Rendering:
    """What the template makes of one turn.

    Attributes:
        prompt: the text that the server makes of the messages before the turn.
    """

    def __init__(self, row: ChatRow, index: int, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise row.refused(
                "has messages, but the base model's tokenizer has no chat template: use prompt and completion",
                "messages",
            )
        self._row, self._index, self._tokenizer = row, index, tokenizer
        # What a client can send: a role and a text.
        self._sent = [{"role": m["role"], "content": m["content"] or ""} for m in row.messages[:index]]
        self.prompt = self._render(self._sent, True)
        self._check_prompt()

    def answer(self) -> str:
        """Returns what follows the prompt: the message as the template renders it, and how it closes the turn."""
        message = self._message()
        after = self._turn(message)
        if after.startswith(self.prompt) and self._is_whole(message["content"] or "", after[len(self.prompt) :]):
            self._check_said(message, after)
            return after[len(self.prompt) :]
        return self._spliced(message, after)

    def _is_whole(self, content: str, answer: str) -> bool:
        """Tells whether an answer holds a content, but for what opens its thinking where the prompt has done so."""
        block = _OPENS.search(self.prompt)
        rest = _without_opening(content, block[1]) if block else content
        content, answer = _squashed(rest), _squashed(answer)
        return content in answer if block is None or rest == content else answer.startswith(content)

    def behind(self, answer: str) -> str:
        """Returns the answer with what the template puts behind it where the user goes on; or "" where it differs.

        Some templates close a turn by the header of the next one, or leave the last turn open.
        """
        goes_on = [*self._sent, self._message(), {"role": "user", "content": _MARK}]
        try:
            text, found, _ = self._render(goes_on, False, self._row.arguments).partition(_MARK)
            if found and text.startswith(self.prompt + answer.rstrip()):
                return text.removeprefix(self.prompt)
            return answer + self._header_behind()
        except InvalidArgumentError:  # a template that does not take a user's message there
            return ""

    def _header_behind(self) -> str:
        """Returns what the template puts behind a turn where the user goes on, beyond how it closes a last one."""
        turn = {"role": self._row.messages[self._index]["role"], "content": _CONTENT}
        goes_on = [*self._sent, turn, {"role": "user", "content": _MARK}]
        alone = self._turn(turn).rpartition(_CONTENT)[2]
        between = self._render(goes_on, False, self._row.arguments).partition(_MARK)[0].rpartition(_CONTENT)[2]
        return between.removeprefix(alone) if between.startswith(alone) else ""

    def without_space(self, answer: str) -> str:
        """Returns the answer without the space behind what closes the turn; where space alone does, with it."""
        content = (self._row.messages[self._index]["content"] or "").rstrip()
        closing = answer[answer.rfind(content) + len(content) :]
        return answer.rstrip() if closing.strip() else answer

    def _render(
        self, messages: Sequence[Mapping[str, Any]], opens: bool, arguments: Mapping[str, Any] | None = None
    ) -> str:
        try:
            return render_chat(self._tokenizer, messages, add_generation_prompt=opens, **(arguments or {}))
        except (InvalidArgumentError, TypeError) as error:  # of TypeError: an argument that is one of the function's
            raise self._row.refused(f"cannot be rendered up to messages[{self._index}]: {error}", "messages") from error

    def _turn(self, message: Mapping[str, Any]) -> str:
        return self._render([*self._sent, message], False, self._row.arguments)

    def _check_prompt(self) -> None:
        """Refuses what the template renders of a row and the server never would."""
        before = self._row.messages[: self._index]
        peculiar = [key for m in before for key, value in m.items() if key not in ("role", "content") and value]
        if not peculiar and not self._row.arguments:
            return
        if self._render([dict(m) for m in before], True, self._row.arguments) == self.prompt:
            return
        if self._render(self._sent, True, self._row.arguments) != self.prompt:
            names, field = ", ".join(self._row.arguments), "chat_template_kwargs"
            problem = f"has {field} ({names})"
        else:
            field = self._first_peculiar(before)
            problem = f"has {field}"
        raise self._row.refused(
            f"{problem}, which changes the prompt of messages[{self._index}], and which Generate cannot send: write it "
            "as content, or the row as prompt and completion",
            field,
        )

    def _first_peculiar(self, before: tuple[Mapping[str, Any], ...]) -> str:
        for at, message in enumerate(before):
            for key, value in message.items():
                if key not in ("role", "content") and value:
                    one = [*self._sent[:at], {**self._sent[at], key: value}, *self._sent[at + 1 :]]
                    if self._render(one, True) != self.prompt:
                        return f"messages[{at}].{key}"
        return "messages"

    def _message(self) -> dict[str, Any]:
        """Returns the message as the template takes it.

        That is without a content that it would render as the word None, and without arguments of calls as JSON text
        (OpenAI's form) where it would render them as a JSON string.
        """
        message = self._with_arguments(dict(self._row.messages[self._index]))
        if message["content"] is None and self._turn(message) == self._turn({**message, "content": "None"}):
            message["content"] = ""
        return message

    def _with_arguments(self, message: dict[str, Any]) -> dict[str, Any]:
        objects = _with_arguments(message)
        if objects == message:  # no arguments that are the text of an object
            return message
        try:
            return message if _AS_TEXT in self._turn(_with_arguments(message, _AS_TEXT)) else objects
        except InvalidArgumentError:  # a template that takes objects alone
            return objects

    def _check_said(self, message: Mapping[str, Any], after: str) -> None:
        for key in SAID_KEYS:
            if message.get(key):
                without = {**{k: v for k, v in message.items() if k != key}, "content": message["content"] or ""}
                if self._turn(without) == after:
                    field = f"messages[{self._index}].{key}"
                    raise self._row.refused(
                        f"has {field}, which the chat template does not render: write it as content", field
                    )

    def _spliced(self, message: Mapping[str, Any], after: str) -> str:
        """Returns the answer where the template does not render the turn behind its prompt, or not whole.

        Templates that leave out thinking do so, and those whose prompt opens a block (``<think>``) or places the system
        message by what comes last. What the template puts around a content is taken from one of no text.
        """
        field = f"messages[{self._index}]"
        if any(message.get(key) for key in ("tool_calls", "function_call")):
            beside = "text beside " if after.startswith(self.prompt) else ""
            raise self._row.refused(
                f"has {beside}calls in {field}, which the template does not render behind its prompt", field
            )
        shown = self._turn({"role": message["role"], "content": _CONTENT})
        header, found, closing = shown.partition(_CONTENT)
        edge = self._edge() if found and _CONTENT not in closing else None
        if edge is None:
            raise self._row.refused(
                f"has {field}, which the chat template does not render as an answer to the messages before it", field
            )
        content: str = message["content"]
        lead, opened = self._thinking(*edge, content)
        if after.startswith(header) and after.endswith(closing):
            rendered = after[len(header) : len(after) - len(closing)]
            content = rendered if _squashed(rendered) == _squashed(content) else content
        thought = next((message[key] for key in THOUGHT_KEYS if isinstance(message.get(key), str)), "")
        if opened.strip():
            return lead + self._continued(content, opened, thought) + closing
        if thought:
            raise self._row.refused(
                f"has thinking beside the content of {field}, which the template does not render behind its prompt: "
                "write it as content",
                field,
            )
        return lead + content + closing

    def _thinking(self, lead: str, opened: str, content: str) -> tuple[str, str]:
        """Returns what `_edge` does for a content with a block of thinking of its own, where the template has one.

        The content's block is then the one that the prompt has opened, or stands for the one without a thought.
        """
        block = _OPENS.search(self.prompt)
        if block and lead and _without_opening(content, block[1]) != content:
            return "", block[0]
        empty = _NO_THOUGHT.fullmatch(lead)
        thinks = empty and _without_opening(content, empty[1]) != content and f"</{empty[1]}>" in content
        return ("", opened) if thinks else (lead, opened)

    def _edge(self) -> tuple[str, str] | None:
        """Returns what the template puts before a turn's content beyond the prompt, and what the prompt has beyond it.

        Both are read behind the last message before the turn, whose text is replaced by a mark for that: what comes
        before it may differ (a system message that goes into the last user's).
        """
        marked = [*self._sent[:-1], {**self._sent[-1], "content": _MARK}]
        turn = self._render([*marked, {"role": "assistant", "content": _CONTENT}], False, self._row.arguments)
        _, prompt_has, behind_prompt = self._render(marked, True).rpartition(_MARK)
        _, turn_has, behind_turn = turn.partition(_CONTENT)[0].rpartition(_MARK)
        if not (prompt_has and turn_has):
            return None
        if behind_turn.startswith(behind_prompt):
            return behind_turn[len(behind_prompt) :], ""
        if behind_prompt.startswith(behind_turn):
            return "", behind_prompt[len(behind_turn) :]
        # Of a turn without thinking, what closes the block stands where the prompt opens it.
        block = _OPENS.search(behind_prompt)
        closing = behind_turn.removeprefix(behind_prompt[: block.start()]) if block else ""
        return (closing, "") if block and closing.startswith(f"</{block[1]}>") else None

    def _continued(self, content: str, opened: str, thought: str) -> str:
        """Returns the content as it goes on in the block that the prompt has opened."""
        found = _OPENED.fullmatch(opened)
        if found is None:
            raise self._row.refused(
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
    """Returns a content without what opens the block of thinking that it begins with; itself where it has none."""
    return content.lstrip().removeprefix(f"<{block}>") if content.lstrip().startswith(f"<{block}>") else content


def _squashed(text: str) -> str:
    return "".join(text.split())


def _with_arguments(message: Mapping[str, Any], arguments: str | None = None) -> dict[str, Any]:
    """Returns a message whose calls' arguments that are the text of a JSON object are that object, or a text given."""

    def read(function: Any) -> Any:
        text = function.get("arguments") if isinstance(function, Mapping) else None
        try:
            found = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            return function
        if not isinstance(found, dict):
            return function
        return {**function, "arguments": found if arguments is None else arguments}

    changed = dict(message)
    if isinstance(message.get("tool_calls"), list):
        changed["tool_calls"] = [
            read({**call, "function": read(call["function"])} if "function" in call else call)
            if isinstance(call, Mapping)
            else call
            for call in message["tool_calls"]
        ]
    if "function_call" in message:
        changed["function_call"] = read(message["function_call"])
    return changed
