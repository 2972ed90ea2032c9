"""How the demo's base model is made, and what the one that ships can do."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from deltamux_trainers.demo import base
from deltamux_trainers.demo.skills import BY_NAME, Exchange, dialogue, messages
from deltamux_trainers.demo.tasks import TASKS, score
from deltamux_trainers.demo.tokenizer import END, train_tokenizer

TINY = base.Recipe(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    steps=3,
    batch_size=4,
    length=96,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    rng = Random(0)
    return train_tokenizer([each["content"] for _ in range(500) for each in dialogue(rng)], TINY.vocab_size)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    path = str(base.BASE_MODEL)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def answers(model: Any, tokenizer: Any, dialogues: list[list[dict[str, str]]]) -> list[str]:
    """Returns the model's greedy replies to the dialogues without their last message."""
    replies = []
    for each in dialogues:
        prompt = tokenizer.apply_chat_template(each[:-1], add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=48, do_sample=False)
        replies.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return replies


def test_text_comes_back_from_the_tokenizer_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Naïve café, 1977-01-29:  two  spaces\nand a line."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_puts_each_message_between_its_role_and_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    example = messages("Do it.", Exchange("Now?", "Yes."))
    whole = tokenizer.apply_chat_template(example, tokenize=False)
    asked = tokenizer.apply_chat_template(example[:-1], tokenize=False, add_generation_prompt=True)
    assert whole == f"<|system|>Do it.{END}<|user|>Now?{END}<|assistant|>Yes.{END}"
    assert whole == f"{asked}Yes.{END}"


def test_only_replies_are_learnt_from_dialogues(tokenizer: PreTrainedTokenizerFast) -> None:
    for tokens, labels in islice(base.dialogue_rows(TINY, tokenizer), 20):
        learnt = str(tokenizer.decode([label for label in labels if label != base.IGNORE_INDEX]))
        replies = [part.split("<|assistant|>")[1] for part in str(tokenizer.decode(tokens)).split("<|user|>")[1:]]
        assert learnt.split(END)[:-1] == [reply.split(END)[0] for reply in replies]


def test_batches_have_the_recipes_shape(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, labels = next(base.batches(TINY, tokenizer))
    assert tokens.shape == labels.shape == (TINY.batch_size, TINY.length)
    assert bool((labels != base.IGNORE_INDEX).any(dim=1).all()), "every row teaches something"


@pytest.mark.slow
def test_the_same_seed_trains_the_same_model() -> None:
    first, _ = base.pretrain(TINY)
    again, _ = base.pretrain(TINY)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_the_command_writes_a_model_that_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = base.pretrain
    monkeypatch.setattr(base, "pretrain", lambda recipe: pretrain(replace(TINY, seed=recipe.seed, steps=recipe.steps)))
    base.main(["--output", str(tmp_path), "--steps", "2", "--seed", "5"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def test_the_shipped_model_has_heads_that_vllm_serves_on_a_cpu() -> None:
    config = json.loads((base.BASE_MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_size"] // config["num_attention_heads"] >= 32
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
def test_the_shipped_model_has_the_skills_that_the_tenants_build_on(shipped: tuple[Any, Any]) -> None:
    rng = Random("unseen by the pre-training")
    for name in ("topic and urgency", "order fields", "ISO date"):
        skill = BY_NAME[name]
        asked = [messages(skill.instructions[0], skill.exchange(rng)) for _ in range(15)]
        assert score(answers(*shipped, asked), [each[-1]["content"] for each in asked]) >= 0.8, name


@pytest.mark.slow
def test_the_shipped_model_alone_fails_every_tenants_task(shipped: tuple[Any, Any]) -> None:
    for task in TASKS:
        asked = task.examples(10, held_out=True)
        assert score(answers(*shipped, asked), [each[-1]["content"] for each in asked]) <= 0.1, task.tenant
