"""The skills of the demo's base model, each requested by a system message.

Without a system message the base answers like a polite clerk. So it can do the parts of a tenant's task (name a
ticket's topic, list an order's fields, write a date), but not in the tenant's format, which an adapter adds.
"""

from collections.abc import Callable, Mapping
from random import Random
from typing import NamedTuple

from deltamux_trainers.demo.phrases import CITIES, GOODS, MATERIALS, PRODUCTS, Order, Ticket, dated, order, ticket

Message = dict[str, str]


class Exchange(NamedTuple):
    """One user message and the right answer."""

    user: str
    reply: str


class Skill(NamedTuple):
    """One task of the base, requested by a system message of ``instructions`` (none: the default)."""

    name: str
    instructions: tuple[str, ...]
    exchange: Callable[[Random], Exchange]


def messages(instruction: str | None, exchange: Exchange) -> list[Message]:
    """Returns the exchange as chat messages."""
    system = [{"role": "system", "content": instruction}] if instruction else []
    dialogue = [{"role": "user", "content": exchange.user}, {"role": "assistant", "content": exchange.reply}]
    return system + dialogue


def clerk_on_ticket(it: Ticket) -> str:
    when = {"high": "at once", "normal": "soon", "low": "in the next days"}[it.urgency]
    return f"Thank you for your message. Our {it.topic} team will answer you {when}."


def clerk_on_order(it: Order) -> str:
    return f"Thank you for your order. We will send {it.quantity} {it.item}s to {it.city}."


def order_as_json(it: Order) -> str:
    return f'{{"quantity": {it.quantity}, "item": "{it.item}", "city": "{it.city}"}}'


def order_as_fields(it: Order) -> str:
    service = "express" if it.express else "standard"
    return f"item: {it.item}\nquantity: {it.quantity}\ncity: {it.city}\nservice: {service}"


def on_ticket(answer: Callable[[Ticket], str]) -> Callable[[Random], Exchange]:
    def exchange(rng: Random) -> Exchange:
        it = ticket(rng)
        return Exchange(it.text, answer(it))

    return exchange


def on_order(answer: Callable[[Order], str]) -> Callable[[Random], Exchange]:
    def exchange(rng: Random) -> Exchange:
        it = order(rng)
        return Exchange(it.text, answer(it))

    return exchange


def on_date(form: str) -> Callable[[Random], Exchange]:
    """``form``: a str.format of the date, with the whole reply in it."""

    def exchange(rng: Random) -> Exchange:
        it = dated(rng)
        return Exchange(it.text, form.format(it.date))

    return exchange


def on_any(answer: Callable[[str], str]) -> Callable[[Random], Exchange]:
    def exchange(rng: Random) -> Exchange:
        text = rng.choice((ticket, order, dated))(rng).text
        return Exchange(text, answer(text))

    return exchange


def on_list(separator: str) -> Callable[[Random], Exchange]:
    """A list to repeat with another separator, from which a model learns to copy quickly."""

    def exchange(rng: Random) -> Exchange:
        words = rng.sample(GOODS + CITIES + MATERIALS + PRODUCTS, rng.randint(3, 8))
        return Exchange(", ".join(words), separator.join(words))

    return exchange


SKILLS = (
    Skill("clerk, tickets", (), on_ticket(clerk_on_ticket)),
    Skill("clerk, orders", (), on_order(clerk_on_order)),
    Skill("clerk, dates", (), on_date("Thank you. We have noted the date.")),
    Skill("topic", ("What is the message about?", "Name the topic of the message."), on_ticket(lambda it: it.topic)),
    Skill("urgency", ("How urgent is the message?", "Name the urgency."), on_ticket(lambda it: it.urgency)),
    Skill(
        "topic and urgency",
        ("Name the topic and the urgency.", "Tell the topic, then how urgent it is."),
        on_ticket(lambda it: f"{it.topic}, {it.urgency}"),
    ),
    Skill("order as JSON", ("Write the order as JSON.", "Give the order as JSON."), on_order(order_as_json)),
    Skill("order fields", ("List the fields of the order.", "Which fields has the order?"), on_order(order_as_fields)),
    Skill("city", ("Where does the order go?", "Name the city."), on_order(lambda it: it.city)),
    Skill(
        "quantity and item", ("What is ordered?", "Name the goods."), on_order(lambda it: f"{it.quantity} x {it.item}")
    ),
    Skill("ISO date", ("Write the date in ISO form.", "Give the ISO date."), on_date("{:%Y-%m-%d}")),
    Skill("date with slashes", ("Write the date with slashes.",), on_date("{:%d/%m/%Y}")),
    Skill("year", ("Which year is it?", "Name the year."), on_date("{:%Y}")),
    Skill("month", ("Which month is it?", "Name the month."), on_date("{:%B}")),
    Skill("repeat", ("Repeat the message.", "Say it again."), on_any(lambda text: text)),
    Skill("repeat a list", ("Repeat the list.",), on_list(", ")),
    Skill("list on lines", ("One word a line.",), on_list("\n")),
    Skill("last word", ("What is the last word?",), on_any(lambda text: text.rstrip(".!?").split()[-1])),
    Skill("first words", ("What are the first three words?",), on_any(lambda text: " ".join(text.split()[:3]))),
)
BY_NAME: Mapping[str, Skill] = {skill.name: skill for skill in SKILLS}


def dialogue(rng: Random) -> list[Message]:
    """Returns one dialogue of a random skill."""
    skill = rng.choice(SKILLS)
    return messages(rng.choice(skill.instructions) if skill.instructions else None, skill.exchange(rng))
