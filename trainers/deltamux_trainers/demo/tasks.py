"""The demo's three tenants: their tasks, examples, and the score of answers.

``python -m deltamux_trainers.demo.tasks --output DIR`` writes every tenant's train.jsonl and eval.jsonl.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from deltamux_trainers.demo.phrases import dated, order, ticket
from deltamux_trainers.demo.skills import Exchange, Message, messages

TRAIN_EXAMPLES = 2000
EVAL_EXAMPLES = 60


@dataclass(frozen=True)
class TenantTask:
    """One tenant's task, and the method that learns it.

    Attributes:
        tenant: also the tenant's name on the server.
        adapter: the adapter's name on the server.
        method: name of the fine-tuning method.
        title: a description of the task, for people.
        exchange: draws one example; True: of the held-out part of the vocabulary, False: of the rest.
        options: the method's options.
        training: the trainer's options.
    """

    tenant: str
    adapter: str
    method: str
    title: str
    exchange: Callable[[Random, bool], Exchange]
    options: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)

    @property
    def resource(self) -> str:
        return f"tenants/{self.tenant}/adapters/{self.adapter}"

    def examples(self, count: int, *, held_out: bool, seed: int = 0) -> list[list[Message]]:
        """Returns ``count`` different dialogues; held-out ones share no example with the others."""
        rng = Random(f"{self.tenant} {held_out} {seed}")
        drawn: dict[str, Exchange] = {}
        while len(drawn) < count:
            example = self.exchange(rng, held_out)
            drawn.setdefault(example.user, example)
        return [messages(None, example) for example in drawn.values()]

    def write(self, folder: Path, *, train: int = TRAIN_EXAMPLES, evaluate: int = EVAL_EXAMPLES) -> None:
        """Writes train.jsonl and eval.jsonl, one ``{"messages": [...]}`` per line."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, count, held_out in (("train", train, False), ("eval", evaluate, True)):
            lines = (json.dumps({"messages": each}) for each in self.examples(count, held_out=held_out))
            (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def score(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Returns the share of answers that are right to the letter, but for white space around them."""
    return sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)) / len(expected)


def routing_label(rng: Random, held_out: bool) -> Exchange:
    """Returns a ticket of acme's help desk, and its routing label in JSON."""
    it = ticket(rng, held_out)
    priority = {"high": "P1", "normal": "P2", "low": "P3"}[it.urgency]
    return Exchange(it.text, json.dumps({"queue": it.topic, "priority": priority}))


def packing_slip(rng: Random, held_out: bool) -> Exchange:
    """Returns an order of globex's warehouse, and its packing slip in one line."""
    it = order(rng, held_out)
    return Exchange(it.text, f"{it.quantity} x {it.item} -> {it.city} [{'EXPRESS' if it.express else 'standard'}]")


def iso_date(rng: Random, held_out: bool) -> Exchange:
    """Returns a sentence of initech's archive, and its date in ISO form."""
    it = dated(rng, held_out)
    return Exchange(it.text, f"{it.date:%Y-%m-%d}")


TASKS = (
    TenantTask(
        tenant="acme",
        adapter="tickets",
        method="lora",
        title="support ticket -> routing label in JSON",
        exchange=routing_label,
        options={"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        training={"max_steps": 150, "batch_size": 32, "learning_rate": 2e-3},
    ),
    TenantTask(
        tenant="globex",
        adapter="orders",
        method="houlsby",
        title="order -> packing slip in the house style",
        exchange=packing_slip,
        training={"max_steps": 200, "batch_size": 32, "learning_rate": 4e-3},
    ),
    TenantTask(
        tenant="initech",
        adapter="dates",
        method="prefix",
        title="sentence -> ISO date",
        exchange=iso_date,
        options={"num_virtual_tokens": 16},
        training={"max_steps": 200, "batch_size": 32, "learning_rate": 1e-2},
    ),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deltamux_trainers.demo.tasks", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the tenants' folders")
    folder: Path = parser.parse_args(arguments).output
    for task in TASKS:
        task.write(folder / task.tenant)


if __name__ == "__main__":
    main()
