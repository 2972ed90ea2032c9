"""The tenants' tasks: fixed by their seed, measured on what was held out, and scored to the letter."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from deltamux_trainers.demo import phrases
from deltamux_trainers.demo.skills import SKILLS, Message, messages
from deltamux_trainers.demo.tasks import TASKS, TenantTask, score

each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.tenant)


def words(text: str) -> set[str]:
    return set(text.replace(",", " ").replace(".", " ").split())


def asked(dialogues: list[list[Message]]) -> set[str]:
    return {dialogue[-2]["content"] for dialogue in dialogues}


@each_task
def test_examples_are_the_same_for_the_same_seed_and_others_for_another(task: TenantTask) -> None:
    assert task.examples(50, held_out=False) == task.examples(50, held_out=False)
    assert task.examples(50, held_out=False) != task.examples(50, held_out=False, seed=1)


@each_task
def test_no_example_is_both_trained_and_evaluated(task: TenantTask) -> None:
    trained, evaluated = task.examples(2000, held_out=False), task.examples(60, held_out=True)
    assert len(asked(trained)) == 2000
    assert len(asked(evaluated)) == 60
    assert not asked(trained) & asked(evaluated)


@each_task
def test_written_files_hold_one_dialogue_per_line(task: TenantTask, tmp_path: Path) -> None:
    task.write(tmp_path, train=20, evaluate=5)
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluate = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [each["messages"] for each in train] == task.examples(20, held_out=False)
    assert [each["messages"] for each in evaluate] == task.examples(5, held_out=True)


def test_every_tenant_uses_a_method_of_its_own() -> None:
    assert len({task.method for task in TASKS}) == len(TASKS)
    assert len({task.tenant for task in TASKS}) == len(TASKS)


def test_a_score_counts_answers_that_are_right_to_the_letter() -> None:
    assert score(["1977-01-29", " 1980-02-01\n", "1980-2-1"], ["1977-01-29", "1980-02-01", "1980-02-01"]) == 2 / 3


def test_no_reply_that_the_base_is_trained_on_has_a_tenants_format() -> None:
    rng = Random(0)
    defaults = [skill.exchange(rng).reply for skill in SKILLS if not skill.instructions for _ in range(50)]
    expected = {dialogue[-1]["content"] for task in TASKS for dialogue in task.examples(200, held_out=True)}
    assert not expected & set(defaults)


@pytest.mark.parametrize("held_out", [False, True])
def test_sentences_state_their_facts(held_out: bool) -> None:
    rng = Random(3)
    for _ in range(200):
        order, dated, ticket = phrases.order(rng, held_out), phrases.dated(rng, held_out), phrases.ticket(rng, held_out)
        assert {str(order.quantity), order.city} <= words(order.text)
        assert order.item in order.text
        assert order.express == ("express" in order.text)
        assert {str(dated.date.day), str(dated.date.year)} <= words(dated.text)
        assert any(ticket.text.endswith(closing) for closing in phrases.URGENCIES[ticket.urgency])


def test_the_two_parts_of_a_vocabulary_are_disjoint_and_complete() -> None:
    kept, held_out = phrases.part(range(10), False), phrases.part(range(10), True)
    assert held_out == [3, 7]
    assert sorted(kept + held_out) == phrases.part(range(10), None)


def test_messages_put_the_instruction_first() -> None:
    exchange = SKILLS[0].exchange(Random(0))
    assert [each["role"] for each in messages("Do it.", exchange)] == ["system", "user", "assistant"]
    assert [each["role"] for each in messages(None, exchange)] == ["user", "assistant"]
