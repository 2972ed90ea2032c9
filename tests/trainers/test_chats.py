"""Conversations as rows: every trained prompt has the tokens that the server makes of the same messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.errors import InvalidArgumentError
from deltamux.prompts import encode_rendered, render_chat, render_chat_within
from deltamux_testing.chat_templates import CHATML, SHAPES, Shape, decoded
from deltamux_trainers.data.rows import read_rows
from deltamux_trainers.data.tokenization import IGNORE_INDEX, RowTokenizer, TokenizedSequence

Message = dict[str, Any]
LONG = 1 << 20
PIECES = st.sampled_from(["yes", "no", "(", ")", " ", "\n", "é", "answer", "<b>", "▁", "?", "\u2028", "the"])
CONTENTS = st.lists(PIECES, min_size=1, max_size=6).map("".join)


def row_of(tmp_path: Path, messages: Sequence[Message], **beside: Any) -> Any:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages, **beside}))
    return read_rows(file)[0]


def encoded(
    shape: Shape, tmp_path: Path, messages: Sequence[Message], turns: str = "all", **beside: Any
) -> list[TokenizedSequence]:
    return list(RowTokenizer(shape.tokenizer, shape.ends, LONG, turns)(row_of(tmp_path, messages, **beside)).sequences)


def served(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Returns the tokens that the server makes of a chat."""
    return encode_rendered(tokenizer, render_chat_within(tokenizer, messages, max_chars=1 << 20, max_seconds=60))


def learnt(row: TokenizedSequence) -> Iterator[tuple[list[int], list[int]]]:
    """Yields each stretch of learnt tokens with all that stands before it."""
    ids, labels = list(row.input_ids), list(row.labels)
    start = 0
    while start < len(ids):
        if labels[start] == IGNORE_INDEX:
            start += 1
            continue
        end = next((at for at in range(start, len(ids)) if labels[at] == IGNORE_INDEX), len(ids))
        assert labels[start:end] == ids[start:end]
        yield ids[:start], ids[start:end]
        start = end


def conversation(system: str | None, pairs: Sequence[tuple[str, str]]) -> list[Message]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return opening + [{"role": r, "content": c} for pair in pairs for r, c in zip(roles, pair, strict=True)]


@pytest.mark.parametrize("name", SHAPES)
@given(system=st.none() | CONTENTS, pairs=st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
def test_every_turn_is_trained_after_the_context_that_the_server_sends_for_it(
    name: str, tmp_path_factory: pytest.TempPathFactory, system: str | None, pairs: list[tuple[str, str]]
) -> None:
    shape = SHAPES[name]
    messages = conversation(system if shape.system else None, pairs)
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    rows = encoded(shape, tmp_path_factory.getbasetemp(), messages)
    turns = [turn for row in rows for turn in learnt(row)]
    assert [context for context, _ in turns] == [served(shape.tokenizer, messages[:index]) for index in spoken]
    for index, (context, completion) in zip(spoken, turns, strict=True):
        assert [token for token in completion if token in shape.ends] == completion[-1:]
        reply = shape.answer.format(messages[index]["content"]) + shape.end
        text = decoded(shape.tokenizer, context + completion)
        assert without_space(text) == without_space(render_chat(shape.tokenizer, messages[:index]) + reply)


def without_space(text: str) -> str:
    return "".join(text.replace("▁", " ").split())


@pytest.mark.parametrize("name", SHAPES)
def test_the_end_token_is_learnt_once_per_turn_and_is_the_templates_own(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    messages = conversation(None, [("what is it?", "yes"), ("and again?", "(no)")])
    reply = [decoded(shape.tokenizer, ids) for row in encoded(shape, tmp_path, messages) for _, ids in learnt(row)]
    expected = [shape.answer.format(content) + shape.end for content in ("yes", "(no)")]
    if shape.metaspace:  # a decoder of ▁ may drop the space that a text begins with
        reply, expected = [text.lstrip() for text in reply], [text.lstrip() for text in expected]
    assert reply == expected


def test_turns_share_a_row_while_each_prompt_continues_the_last_answer(tmp_path: Path) -> None:
    messages = conversation("be brief", [("what?", "yes"), ("again?", "no")])
    rows = {name: encoded(shape, tmp_path, messages[not shape.system :]) for name, shape in SHAPES.items()}
    assert {name: len(made) for name, made in rows.items()} == {
        "chatml": 1,
        "qwen2.5": 1,
        "qwen3": 2,  # earlier turns lose their block of thinking
        "qwen3-thinking": 2,
        "always-thinks": 2,
        "llama3": 1,
        "llama2": 1,
        "mistral": 2,  # the system message goes into the last message of the user
        "gemma": 1,
        "phi": 1,
        "glm4": 1,
        "glm4.7": 2,
        "last-turn-open": 1,
        "smolvlm": 1,
        "deepseek-r1": 2,
    }  # fmt: skip


def test_the_last_turn_alone_is_learnt_where_that_is_chosen(tmp_path: Path) -> None:
    messages = conversation(None, [("what?", "yes"), ("again?", "no")])
    shape = SHAPES["chatml"]
    ((context, completion),) = [t for row in encoded(shape, tmp_path, messages, turns="last") for t in learnt(row)]
    assert context == served(shape.tokenizer, messages[:3])
    assert decoded(shape.tokenizer, completion) == "no<|im_end|>"


@pytest.mark.parametrize(
    ("name", "content", "reply"),
    [
        ("qwen3", "<think>\nwhy\n</think>\n\nyes", "<think>\nwhy\n</think>\n\nyes"),
        ("qwen3", "<think>\nwhy\n</think>\n\nits </think> ends", "<think>\nwhy\n</think>\n\nits </think> ends"),
        ("qwen3-thinking", "<think>\nwhy\n</think>\n\nyes", "why\n</think>\n\nyes"),
        ("qwen3-thinking", "<think>why</think>yes", "why\n</think>\n\nyes"),
        ("qwen3-thinking", "<think>\nwhy\n</think>\n\nits </think> ends", "why\n</think>\n\nits </think> ends"),
        ("qwen3-thinking", "<think>\nnever closed", "never closed"),
        ("glm4.7", "<think>why</think>yes", "why</think>\nyes"),
        ("always-thinks", "<think>\nwhy\n</think>\n\nyes", "why\n</think>\n\nyes"),
        ("always-thinks", "<think>why</think>yes", "why</think>yes"),
        ("deepseek-r1", "<think>\nwhy\n</think>\n\nyes", "why\n</think>\n\nyes"),
        ("deepseek-r1", "why</think>yes", "why</think>yes"),
        ("chatml", "<think>\nwhy\n</think>\n\nyes", "<think>\nwhy\n</think>\n\nyes"),
    ],
)
def test_thinking_within_the_content_is_learnt(name: str, content: str, reply: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    messages = conversation(None, [("what?", content)])
    ((context, completion),) = [t for row in encoded(shape, tmp_path, messages) for t in learnt(row)]
    assert context == served(shape.tokenizer, messages[:1])
    assert decoded(shape.tokenizer, completion) == reply + shape.end


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("qwen3", "<think>\nwhy\n</think>\n\nyes"),
        ("qwen3-thinking", "why\n</think>\n\nyes"),
        ("glm4.7", "why</think>\nyes"),
        ("deepseek-r1", "why\n</think>\n\nyes"),
    ],
)
def test_thinking_next_to_the_content_is_learnt_where_the_template_has_a_place_for_it(
    name: str, reply: str, tmp_path: Path
) -> None:
    shape = SHAPES[name]
    messages = conversation(None, [("what?", "yes")])
    messages[1]["reasoning_content"] = "why"
    ((_, completion),) = [t for row in encoded(shape, tmp_path, messages) for t in learnt(row)]
    assert decoded(shape.tokenizer, completion) == reply + shape.end


def test_thinking_that_a_template_drops_from_the_turn_itself_is_learnt_as_it_was_written(tmp_path: Path) -> None:
    given = SHAPES["deepseek-r1"]
    shape = Shape(given.template.replace("<think>\\n", ""), given.end, given.specials, bos=given.bos)
    messages = conversation(None, [("what?", "<think>why</think>yes")])
    ((_, completion),) = [t for row in encoded(shape, tmp_path, messages) for t in learnt(row)]
    assert decoded(shape.tokenizer, completion) == "<think>why</think>yes" + given.end


def test_weight_0_makes_a_turn_context_only(tmp_path: Path) -> None:
    messages = conversation(None, [("what?", "yes"), ("again?", "no")])
    messages[1]["weight"] = 0
    shape = SHAPES["chatml"]
    ((context, completion),) = [t for row in encoded(shape, tmp_path, messages) for t in learnt(row)]
    assert context == served(shape.tokenizer, conversation(None, [("what?", "yes"), ("again?", "")])[:3])
    assert decoded(shape.tokenizer, completion) == "no<|im_end|>"


def test_text_parts_are_joined_by_a_line_break(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "what"}, {"type": "text", "text": "is it?"}]
    plain = conversation(None, [("what\nis it?", "yes")])
    given = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    for name, shape in SHAPES.items():
        assert encoded(shape, tmp_path, given) == encoded(shape, tmp_path, plain), name


CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "here"}}}


def test_a_last_turn_of_calls_is_learnt_as_the_template_renders_it(tmp_path: Path) -> None:
    messages: list[Message] = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": None}]
    messages[1]["tool_calls"] = [CALL]
    shape = SHAPES["qwen2.5"]
    ((context, completion),) = [t for row in encoded(shape, tmp_path, messages) for t in learnt(row)]
    assert context == served(shape.tokenizer, messages[:1])
    assert decoded(shape.tokenizer, completion).split() == [
        "<tool_call>", '{"name":', '"look",', '"arguments":', '{"where":', '"here"}}', "</tool_call><|im_end|>"
    ]  # fmt: skip


ASKED: Message = {"role": "user", "content": "what?"}
YES: Message = {"role": "assistant", "content": "yes"}
TAKES_TEXT = CHATML.replace(
    "{{ m.content }}", "{{ m.tool_calls[0].function.arguments + '' if m.tool_calls else m.content }}"
)
"""Puts arguments in as they are, which fails on an object."""


@pytest.mark.parametrize("arguments", [{"where": "here"}, {}, {"a": 'say "yes"', "b": [1, None]}])
@pytest.mark.parametrize("shape", [SHAPES["qwen2.5"], SHAPES["llama3"]], ids=["qwen2.5", "llama3"])
def test_arguments_as_text_are_learnt_as_the_object_that_they_are(
    shape: Shape, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """OpenAI's form has them as JSON text, which a template that writes JSON would quote once more."""

    def turn(given: Any) -> list[TokenizedSequence]:
        call = {"type": "function", "function": {"name": "look", "arguments": given}}
        return encoded(shape, tmp_path, [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}])

    assert turn(json.dumps(arguments)) == turn(arguments)
    assert "\\\\" not in repr(decoded(shape.tokenizer, turn("{}")[0].input_ids))


@pytest.mark.parametrize("text", ['{"where":   "here"}', "{}", "not JSON"])
def test_arguments_as_text_stay_text_where_the_template_takes_text(text: str, tmp_path: Path) -> None:
    shape = Shape(TAKES_TEXT, "<|im_end|>", ("<|im_start|>",))
    call = {"type": "function", "function": {"name": "look", "arguments": text}}
    (row,) = encoded(shape, tmp_path, [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}])
    ((_, reply),) = learnt(row)
    assert decoded(shape.tokenizer, reply) == f"{text}<|im_end|>"


READS_EVERY_KEY = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if 'tool_calls' in m %}{{ m.tool_calls | length }} calls{% endif %}{{ m.content }}",
)


@pytest.mark.parametrize(
    "nothing", [{"reasoning_content": None}, {"tool_calls": None}, {"tool_calls": []}, {"name": None}]
)
def test_a_key_that_is_null_is_not_there(nothing: dict[str, Any], tmp_path: Path) -> None:
    """As in files of columns, where every message has every key."""
    shape = Shape(READS_EVERY_KEY, "<|im_end|>", ("<|im_start|>",))
    (plain,) = encoded(shape, tmp_path, [ASKED, YES])
    assert encoded(shape, tmp_path, [{**ASKED, **nothing}, {**YES, **nothing}]) == [plain]


def calling(**beside: Any) -> list[Message]:
    return [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], **beside},
        {"role": "tool", "content": "here"},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.mark.parametrize(
    ("name", "messages", "beside", "problem"),
    [
        ("qwen2.5", [ASKED, YES], {"tools": [{"name": "look"}]}, ":1 has tools, which Generate cannot send"),
        ("qwen2.5", calling(), {}, r"has messages\[1\].tool_calls, which changes the prompt of messages\[3\]"),
        ("qwen2.5", calling(weight=0), {}, r"has messages\[1\].tool_calls, which changes the prompt"),
        ("chatml", calling()[:2], {}, r"has messages\[1\].tool_calls, which the chat template does not render"),
        ("deepseek-r1", calling()[:2], {}, r"has calls in messages\[1\]"),
        ("llama3", calling(content="I shall see")[:2], {}, r"has text next to calls in messages\[1\]"),
        ("chatml", [ASKED, {**YES, "reasoning_content": "why"}], {}, r"reasoning_content, which the chat template"),
        (
            "mistral",
            [{"role": "system", "content": "be brief"}, ASKED, {**YES, "reasoning_content": "why"}],
            {},
            r"thinking next to the content of messages\[2\]",
        ),
        ("qwen3", [ASKED, YES], {"chat_template_kwargs": {"enable_thinking": False}}, r"\(enable_thinking\)"),
        ("chatml", [ASKED, YES], {"chat_template_kwargs": {"chat_template": "x"}}, r"\(chat_template\)"),
        ("chatml", [ASKED, YES], {"chat_template_kwargs": {"tokenize": True}}, "cannot be rendered"),
        ("chatml", [ASKED, {"role": "assistant", "content": None}], {}, r"messages\[1\].content is missing"),
        ("chatml", [ASKED, {"role": "assistant", "content": 7}], {}, r"messages\[1\].content is a number"),
        ("chatml", [ASKED, {"role": "assistant", "content": ["yes"]}], {}, r"content\[0\], which is "),
        ("chatml", [{"role": "user", "content": [{"type": "image_url"}]}, YES], {}, "of type 'image_url'"),
        ("chatml", [ASKED, {**YES, "weight": 0.5}], {}, r"messages\[1\].weight 0.5"),
        ("chatml", [ASKED, {**YES, "train": False}], {}, r"messages\[1\].train False, which is not read: write"),
        ("chatml", [ASKED, {**YES, "loss": 0}], {}, r"messages\[1\].loss 0, which is not read"),
        ("chatml", [ASKED, YES], {"weight": 0}, "has weight 0, and rows are learnt alike"),
        ("chatml", [ASKED, YES], {"label": False}, "has label false, which marks an answer that is not wanted"),
        ("chatml", [ASKED, YES], {"system": "be brief"}, "has system next to messages, which would be left out"),
        ("chatml", [ASKED, YES], {"history": [["a", "b"]]}, "has history next to messages"),
        ("chatml", [{**ASKED, "weight": 1}, YES], {}, "only the assistant's messages are learnt"),
        ("chatml", [YES, ASKED, YES], {}, "begins with a message of the assistant"),
        ("chatml", [ASKED], {}, "no message of the assistant"),
        ("chatml", [ASKED, {"role": "assistant"}], {}, r"messages\[1\].content is missing"),
        ("chatml", [ASKED, "yes"], {}, r"messages\[1\], which is "),
        ("chatml", {"role": "user"}, {}, "messages is an object"),
        ("chatml", [ASKED, {**YES, "content": "yes<|im_end|>no"}], {}, r"'<\|im_end\|>' within messages\[1\].content"),
        ("gemma", [{"role": "system", "content": "be brief"}, ASKED, YES], {}, "System role not supported"),
        ("mistral", [ASKED, YES, YES], {}, "roles must alternate"),
        ("chatml", [ASKED, {**YES, "content": "\ud800"}], {}, "lone surrogate in messages"),
    ],
)  # fmt: skip
def test_what_the_server_cannot_send_or_the_template_cannot_render_is_refused(
    name: str, messages: list[Message], beside: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match=problem) as refused:
        encoded(SHAPES[name], tmp_path, messages, **beside)
    assert refused.value.reason == "INVALID_DATA"
    assert refused.value.metadata["line"] == "1"
    assert "field" in refused.value.metadata or "role" in problem


@pytest.mark.parametrize("value", [True, False])
def test_template_arguments_that_change_nothing_are_followed(value: bool, tmp_path: Path) -> None:
    given = {"enable_thinking": True, "unknown": value}
    shape = SHAPES["qwen3"]
    assert encoded(shape, tmp_path, [ASKED, YES], chat_template_kwargs=given) == encoded(shape, tmp_path, [ASKED, YES])


def test_keys_that_no_template_reads_are_ignored(tmp_path: Path) -> None:
    shape = SHAPES["qwen2.5"]
    given = [{**ASKED, "name": "ada", "id": 7}, {**YES, "id": 8, "tool_calls": None, "refusal": None}]
    assert encoded(shape, tmp_path, given, source="x", tools=[]) == encoded(shape, tmp_path, [ASKED, YES])


def test_a_template_that_closes_no_turn_is_learnt_whole_without_eos(tmp_path: Path) -> None:
    opening = "{% if add_generation_prompt %}<assistant>{% endif %}"
    shape = Shape("{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}" + opening, "</s>", ())
    made = RowTokenizer(shape.tokenizer, shape.ends, LONG)(row_of(tmp_path, [ASKED, YES]))
    assert [decoded(shape.tokenizer, ids) for row in made.sequences for _, ids in learnt(row)] == ["yes;"]
    assert not made.ends_with_eos


@pytest.mark.parametrize(("closing", "reply"), [(";\n", "yes;"), ("\n", "yes\n"), ("<|im_end|>\n", "yes<|im_end|>")])
def test_text_that_closes_the_turn_is_learnt_without_the_space_after_it(
    closing: str, reply: str, tmp_path: Path
) -> None:
    opening = "{% if add_generation_prompt %}assistant: {% endif %}"
    shape = Shape(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}" + closing + "{% endfor %}" + opening, "</s>", ()
    )
    (row,) = RowTokenizer(shape.tokenizer, shape.ends, LONG)(row_of(tmp_path, [ASKED, YES])).sequences
    assert [decoded(shape.tokenizer, ids) for _, ids in learnt(row)] == [reply]


def test_a_token_that_closes_the_turn_but_does_not_stop_the_server_is_learnt_without_eos(tmp_path: Path) -> None:
    shape = SHAPES["gemma"]
    tokenize = RowTokenizer(shape.tokenizer, frozenset([shape.tokenizer.eos_token_id]), LONG)
    made = tokenize(row_of(tmp_path, [ASKED, YES]))
    assert [decoded(shape.tokenizer, ids) for row in made.sequences for _, ids in learnt(row)] == ["yes<end_of_turn>"]
    assert not made.ends_with_eos


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    shape = Shape("", "<|im_end|>", ())
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        encoded(shape, tmp_path, [ASKED, YES])
