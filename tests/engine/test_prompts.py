"""Prompts become tokens off the event loop, at a cost that the context bounds, and fairly between groups."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deltamux.engine.base import ChatMessage, EngineOptions
from deltamux.engine.fair import FairQueue
from deltamux.engine.vllm.frontend.config import engine_arguments
from deltamux.engine.vllm.frontend.prompts import LONG_TEXT, Prompts
from deltamux.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from deltamux.prompts import PROCESSOR_FILES, encode_rendered, render_chat, with_processor_template
from deltamux_testing.chat_templates import SHAPES
from deltamux_testing.tiny_base import byte_tokenizer, write_base
from deltamux_trainers.loading import load_tokenizer

ROOM = 255


def without_template() -> Any:
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def prompts(max_model_len: int = ROOM + 1, long_token: int = 0) -> Prompts:
    """Args: long_token: characters of the vocabulary's longest token, which bounds what a text may have."""
    tokenizer: Any = byte_tokenizer()
    if long_token:
        tokenizer.add_tokens(["#" * long_token])
    return Prompts(tokenizer, max_model_len)


@pytest.mark.parametrize("text", ["a" * 7_000_000, "word " * 1_400_000, "é" * 3_500_000, "😀" * 1_750_000])
@pytest.mark.parametrize("long_token", [0, 40_000])
async def test_a_text_far_too_long_is_refused_by_its_size_or_its_beginning(text: str, long_token: int) -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidArgumentError) as refused:
        await prompts(long_token=long_token).token_ids(text, ROOM, "")
    assert refused.value.reason == "PROMPT_TOO_LONG"
    assert time.perf_counter() - started < 1.0


@given(st.text(max_size=2000))
async def test_a_text_is_tokenised_as_the_tokenizer_does(text: str) -> None:
    subject = prompts(10_000)
    assert await subject.token_ids(text, 10_000, "") == byte_tokenizer().encode(text)
    subject.close()


async def test_a_long_text_that_fits_is_tokenised_whole() -> None:
    text = "x" * (2 * LONG_TEXT)
    assert len(await prompts(3 * LONG_TEXT).token_ids(text, 3 * LONG_TEXT, "")) == len(text)


def test_hugging_faces_files_are_read_where_mistrals_own_exist_too(tmp_path: Path) -> None:
    """As the trainers do, so that what is trained is what is served."""
    from vllm.tokenizers.registry import resolve_tokenizer_args
    from vllm.transformers_utils.config import get_config

    base = write_base(tmp_path / "base")
    for name in ("consolidated.safetensors", "params.json", "tekken.json"):
        (base / name).write_text("{}")
    given = engine_arguments(EngineOptions(str(base)))
    assert resolve_tokenizer_args(base, runner_type="generate", tokenizer_mode="auto")[0] == "mistral"
    assert resolve_tokenizer_args(base, runner_type="generate", tokenizer_mode=given["tokenizer_mode"])[0] == "hf"
    config = get_config(str(base), trust_remote_code=False, config_format=given["config_format"])
    assert config.model_type == json.loads((base / "config.json").read_text())["model_type"]
    assert given["load_format"] == "hf"
    assert load_tokenizer(str(base)).encode("what?") == byte_tokenizer().encode("what?")


@pytest.mark.parametrize("template", ["{% broken", {"tool_use": "{{ messages }}"}], ids=["syntax", "no default"])
async def test_a_base_whose_chat_template_is_none_refuses_chats_and_no_more(template: Any) -> None:
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = template
    subject = Prompts(tokenizer, ROOM + 1)
    with pytest.raises(InvalidArgumentError, match="the base model's chat template refuses these messages") as refused:
        await subject.token_ids((ChatMessage("user", "what?"),), ROOM, "")
    assert refused.value.reason == "INVALID_CHAT"
    assert await subject.token_ids("what?", ROOM, "") == tokenizer.encode("what?")


async def test_a_chat_is_laid_out_as_the_tokenizer_does() -> None:
    messages = (ChatMessage("system", "be brief"), ChatMessage("user", "hé {{ 1 }}"))
    tokenizer = byte_tokenizer()
    rows = [message._asdict() for message in messages]
    text: Any = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    assert await prompts().token_ids(messages, ROOM, "") == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", [*PROCESSOR_FILES, "chat_template.jinja"])
async def test_a_chat_is_laid_out_by_the_processors_template_where_the_tokenizer_has_none(
    name: str, tmp_path: Path
) -> None:
    """Both by the server and by the trainers; the template reads contents as lists of parts."""
    template = SHAPES["smolvlm"].template
    without_template().save_pretrained(tmp_path)
    content = template if name.endswith(".jinja") else json.dumps({"chat_template": template})
    (tmp_path / name).write_text(content)
    loaded = with_processor_template(AutoTokenizer.from_pretrained(tmp_path), str(tmp_path))
    ids = await Prompts(loaded, ROOM + 1).token_ids((ChatMessage("user", "what?"),), ROOM, "")
    assert loaded.decode(ids) == "<|im_start|>User: what?<|im_end|>\nAssistant:"
    trained = load_tokenizer(str(tmp_path))
    assert encode_rendered(trained, render_chat(trained, [{"role": "user", "content": "what?"}])) == ids


def test_a_damaged_template_of_a_processor_is_named(tmp_path: Path) -> None:
    without_template().save_pretrained(tmp_path)
    (tmp_path / PROCESSOR_FILES[0]).write_text("[")
    with pytest.raises(FailedPreconditionError, match=PROCESSOR_FILES[0]) as refused:
        load_tokenizer(str(tmp_path))
    assert refused.value.reason == "BASE_DAMAGED"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ undefined_thing.more }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
    ],
    ids=["raises", "index", "type", "undefined", "sandbox", "endless"],
)
async def test_a_template_that_fails_or_goes_too_far_refuses_the_messages(template: str) -> None:
    subject = prompts()
    subject._tokenizer.chat_template = template
    started = time.perf_counter()
    with pytest.raises(InvalidArgumentError) as refused:
        await subject.token_ids((ChatMessage("user", "x"),), ROOM, "")
    assert refused.value.reason in ("INVALID_CHAT", "PROMPT_TOO_LONG")
    assert time.perf_counter() - started < 2.0


async def test_one_groups_long_texts_delay_anothers_by_one_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = prompts(4 * LONG_TEXT)
    order: list[str] = []
    gate = threading.Event()

    def encode(text: str, room: int, how: object) -> list[int]:
        order.append(text[0])
        gate.wait(5)
        return [1]

    monkeypatch.setattr(subject, "_encode", encode)
    greedy = [asyncio.create_task(subject.token_ids("g" * LONG_TEXT, ROOM, "greedy")) for _ in range(5)]
    await asyncio.sleep(0.01)
    modest = asyncio.create_task(subject.token_ids("m" * LONG_TEXT, ROOM, "modest"))
    short = asyncio.create_task(subject.token_ids("s", ROOM, "modest"))
    while len(order) < 2:  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0.01)
    gate.set()
    await asyncio.gather(*greedy, modest, short)
    assert order.index("m") == 1  # while one of the others runs, and the rest of them wait


async def test_who_waits_leaves_the_queue_when_cancelled() -> None:
    queue = FairQueue(1, 2, "texts")
    async with queue.place("a"):
        waiting = [asyncio.create_task(enter(queue, "a")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhaustedError) as refused:
            await enter(queue, "a")
        assert refused.value.retry_after
        waiting[0].cancel()
        other = asyncio.create_task(enter(queue, "b"))
        await asyncio.sleep(0)
    await asyncio.gather(waiting[1], other)
    async with asyncio.timeout(1), queue.place("c"):
        pass


async def enter(queue: FairQueue, group: str) -> None:
    async with queue.place(group):
        await asyncio.sleep(0)
