"""Random sentences: support tickets, orders and dates, each with the facts that it states.

They are drawn from a `random.Random`, so that a seed fixes them. ``held_out`` splits every vocabulary into two disjoint
parts, one to train on and one to evaluate on.
"""

import datetime
from collections.abc import Sequence
from random import Random
from typing import NamedTuple, TypeVar

T = TypeVar("T")
HELD_OUT_EVERY = 4

OPENERS = ("", "", "", "Hi, ", "Hello, ", "Hello team, ", "Dear support, ", "Good morning, ", "Good evening, ")
PRODUCTS = (
    "router", "tablet", "camera", "printer", "thermostat", "headset", "speaker", "doorbell", "scanner", "laptop",
)  # fmt: skip

COMPLAINTS: dict[str, tuple[str, ...]] = {
    "billing": (
        "my invoice for the {product} was charged twice",
        "I was billed for a {product} that I never ordered",
        "the refund for my {product} has not reached my bank account",
        "why is there an extra fee on my last invoice",
        "your invoice shows the wrong tax for the {product}",
        "my card was debited again although I had cancelled the plan",
        "I need a receipt for the {product} that I paid in cash",
        "the discount code was not taken off the price of the {product}",
        "I paid the invoice for the {product} twice by mistake",
        "please send me a copy of the invoice for my {product}",
        "the amount on my invoice is too high",
        "my bank says that your payment request was refused",
        "when will I get the refund for the {product}",
        "you charged my credit card for a {product} that I sent back",
        "the price on the bill is not the price of the {product} in your shop",
        "can I pay for the {product} by bank transfer",
        "the monthly fee went up without any notice",
        "I was charged a late fee although I paid the bill on time",
        "please put the name of our company on the invoice",
        "my payment for the {product} does not show in your books",
    ),
    "delivery": (
        "my {product} has not arrived yet",
        "the parcel with the {product} was left at the wrong address",
        "the courier lost the box with my {product}",
        "tracking says that the {product} is still in the warehouse",
        "the {product} was delivered in a broken box",
        "can you send the {product} to another address",
        "the driver did not ring and took the parcel back to the depot",
        "half of my shipment is missing, only the {product} came",
        "where is the parcel with my {product}",
        "when will the {product} be delivered",
        "the {product} was sent to my old address",
        "the parcel was returned to you before I could collect it",
        "the courier says that my address does not exist",
        "my neighbour got the parcel with my {product}",
        "please deliver the {product} to the back door",
        "the shipment with the {product} is late by two weeks",
        "I would like to collect the {product} at the depot myself",
        "the tracking number of my parcel does not work",
        "the driver threw the box with the {product} over the fence",
        "can the {product} be shipped before the weekend",
    ),
    "account": (
        "I cannot log in to my account",
        "please reset my password",
        "my account was locked after I changed my phone",
        "how do I change the email address of my profile",
        "the login code for my account never comes",
        "please delete my profile and all my personal data",
        "somebody else has signed in with my user name",
        "I want to add a second user to our account",
        "my user name is not accepted any more",
        "I forgot the password of my account",
        "please close my account",
        "I never got the email to confirm my account",
        "how can I switch on the login by phone",
        "my profile shows the name of somebody else",
        "I want to merge my two accounts",
        "the password reset link does not work",
        "please change the phone number of my profile",
        "I get no login code on my new phone",
        "who has access to our company account",
        "I cannot sign in with my new email address",
    ),
    "technical": (
        "the {product} does not turn on any more",
        "my {product} loses its wireless connection every hour",
        "after the update the {product} shows a blue screen",
        "the app crashes as soon as I open the {product} page",
        "the {product} makes a loud noise and gets hot",
        "I get error 42 when I set up the {product}",
        "the battery of my {product} is empty after ten minutes",
        "the {product} cannot be found by my computer",
        "my {product} restarts again and again",
        "the screen of the {product} stays black",
        "the {product} does not connect to the network",
        "the {product} is very slow since the last update",
        "my computer does not see the {product}",
        "the app says that the {product} is offline",
        "the {product} stopped working after a storm",
        "there is no sound from the {product}",
        "the buttons of the {product} do not react",
        "the {product} smells burnt when I turn it on",
        "I cannot install the software of the {product}",
        "the {product} shows error 17 and then turns itself off",
    ),
    "sales": (
        "do you give a discount on twenty {product}s",
        "which {product} would you recommend for a small office",
        "I would like a quote for a new {product}",
        "is the new {product} in stock again",
        "can I try the {product} before I buy it",
        "what does the larger {product} cost",
        "do you sell a {product} for schools",
        "when will the next {product} be on sale",
        "do you have the {product} in black",
        "which {product} is the best one for a beginner",
        "I would like to buy ten {product}s for our school",
        "what is the difference between the two {product}s in your shop",
        "is there a cheaper {product} with the same functions",
        "can you make us an offer for a {product} and a service plan",
        "how long is the warranty of the new {product}",
        "do you rent out a {product} for a weekend",
        "do you take my old {product} when I buy a new one",
        "are there any special offers for the {product} this month",
        "I am looking for a {product} that works outdoors",
        "does the new {product} come in other sizes",
    ),
}
URGENCIES: dict[str, tuple[str, ...]] = {
    "high": (
        "This is urgent!",
        "We need help today.",
        "Our whole shop is closed because of this!",
        "Please answer at once.",
    ),
    "normal": ("", "", "Thank you.", "Thanks in advance.", "Kind regards."),
    "low": (
        "There is no hurry.",
        "It can wait until next week.",
        "Whenever you have time.",
        "Any time this month is fine.",
    ),
}

MATERIALS = (
    "copper", "steel", "oak", "glass", "cotton", "silver", "leather", "ceramic", "rubber", "paper", "bamboo", "wool",
)  # fmt: skip
GOODS = (
    "valve", "chair", "lamp", "kettle", "blanket", "mirror", "basket", "hammer", "bottle", "stool", "clock", "ladder",
    "bucket", "carpet", "tray", "whistle",
)  # fmt: skip
CITIES = (
    "Oslo", "Lisbon", "Quito", "Dakar", "Hanoi", "Boston", "Vienna", "Nairobi", "Lima", "Athens", "Kyoto", "Dublin",
    "Toronto", "Prague", "Cairo", "Sydney", "Havana", "Geneva", "Madrid", "Warsaw",
)  # fmt: skip
ORDER_FORMS = (
    "please send {quantity} {item}s to {city}{express}",
    "we would like to order {quantity} {item}s for our shop in {city}{express}",
    "our {city} office needs {quantity} {item}s{express}",
    "could you ship {quantity} {item}s to {city}{express}",
    "I want {quantity} {item}s delivered to {city}{express}",
    "for the branch in {city}, {quantity} {item}s{express}, please",
)
EXPRESS = (" by express", " with express delivery", " as an express shipment")

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
DATE_FORMS = (
    "the meeting is on {day} {month} {year}",
    "she was born on {month} {day}, {year}",
    "the contract ends on {day} {month} {year}",
    "they were married on {month} {day}, {year}",
    "the train leaves on {day} {month} {year}",
    "we opened the shop on {month} {day}, {year}",
    "the letter is dated {day} {month} {year}",
    "payment is due on {month} {day}, {year}",
)


class Ticket(NamedTuple):
    text: str
    topic: str  # a key of COMPLAINTS
    urgency: str  # a key of URGENCIES


class Order(NamedTuple):
    text: str
    quantity: int
    item: str
    city: str
    express: bool


class Dated(NamedTuple):
    text: str
    date: datetime.date


def part(values: Sequence[T], held_out: bool | None) -> list[T]:
    """Returns every fourth value (held out), the others (False), or all of them (None)."""
    if held_out is None:
        return list(values)
    return [value for index, value in enumerate(values) if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) is held_out]


def sentence(text: str) -> str:
    """Returns the text with a capital first letter and a closing mark."""
    text = text.strip()
    closed = text if text[-1] in ".!?" else f"{text}."
    return closed[0].upper() + closed[1:]


def ticket(rng: Random, held_out: bool | None = None) -> Ticket:
    """Returns a support ticket; the wording of the complaint is the part that can be held out."""
    topic = rng.choice(list(COMPLAINTS))
    urgency = rng.choice(list(URGENCIES))
    complaint = rng.choice(part(COMPLAINTS[topic], held_out)).format(product=rng.choice(PRODUCTS))
    text = f"{sentence(rng.choice(OPENERS) + complaint)} {rng.choice(URGENCIES[urgency])}"
    return Ticket(text.strip(), topic, urgency)


def order(rng: Random, held_out: bool | None = None) -> Order:
    """Returns an order; material, city and quantity are the parts that can be held out."""
    item = f"{rng.choice(part(MATERIALS, held_out))} {rng.choice(GOODS)}"
    quantity = rng.choice(part(range(2, 100), held_out))
    city, express = rng.choice(part(CITIES, held_out)), rng.random() < 0.4
    words = {"quantity": quantity, "item": item, "city": city, "express": rng.choice(EXPRESS) if express else ""}
    return Order(sentence(rng.choice(OPENERS) + rng.choice(ORDER_FORMS).format(**words)), quantity, item, city, express)


def dated(rng: Random, held_out: bool | None = None) -> Dated:
    """Returns a sentence with a date between 1950 and 2049; the year is the part that can be held out."""
    year = rng.choice(part(range(1950, 2050), held_out))
    date = datetime.date(year, 1, 1) + datetime.timedelta(days=rng.randrange(365))
    words = {"day": date.day, "month": MONTHS[date.month - 1], "year": year}
    return Dated(sentence(rng.choice(DATE_FORMS).format(**words)), date)
